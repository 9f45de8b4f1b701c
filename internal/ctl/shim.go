// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	"github.com/kata-v2/kata/sandbox/ledger"
)

// shimTimeout bounds a question to a shim.
const shimTimeout = 30 * time.Second

// shimsOf are the sockets of the shims of running pods that match.
func (o *options) shimsOf(match func(ledger.Info) bool) (sockets []string, err error) {
	root, err := o.stateRoot()
	if err != nil {
		return nil, err
	}
	list, err := ledger.List(root)
	if err != nil {
		return nil, err
	}
	for _, i := range list {
		if i.Alive && match(i) {
			sockets = append(sockets, filepath.Join(root, i.Key, "shim.sock"))
		}
	}
	return sockets, nil
}

// podShim is the socket of the shim of a running pod, named by its id, or by its
// key where several have that id.
func (o *options) podShim(pod string) (string, error) {
	found, err := o.shimsOf(func(i ledger.Info) bool { return i.Meta.Sandbox == pod || i.Key == pod })
	switch {
	case err != nil:
		return "", err
	case len(found) == 0:
		return "", fmt.Errorf("no pod %q runs: %w", pod, errdefs.ErrNotFound)
	case len(found) > 1:
		return "", fmt.Errorf("%d running pods have the id %s: name one by its key (kata-ctl ps --json): %w", len(found), pod, errdefs.ErrInvalidArgument)
	}
	return found[0], nil
}

// callShim makes one call of a service on a shim's socket; an error has the
// meaning that the shim gave it (errdefs).
func callShim(ctx context.Context, socket, service, method string, req, resp any) error {
	return callShimFor(ctx, shimTimeout, socket, service, method, req, resp)
}

// callShimFor is callShim for what takes longer.
func callShimFor(ctx context.Context, limit time.Duration, socket, service, method string, req, resp any) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	if err := client.Call(ctx, service, method, req, resp); err != nil {
		return errgrpc.ToNative(err)
	}
	return nil
}
