// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"net"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	"github.com/kata-v2/kata/sandbox/ledger"
)

// shimTimeout bounds a question to a shim.
const shimTimeout = 30 * time.Second

// shimOf is the socket of the shim of a running pod, the first whose id matches;
// "" when none does.
func (o *options) shimOf(match func(sandbox string) bool) (socket string, err error) {
	root, err := o.stateRoot()
	if err != nil {
		return "", err
	}
	list, err := ledger.List(root)
	if err != nil {
		return "", err
	}
	for _, i := range list {
		if i.Alive && match(i.Meta.Sandbox) {
			return filepath.Join(root, i.Key, "shim.sock"), nil
		}
	}
	return "", nil
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
