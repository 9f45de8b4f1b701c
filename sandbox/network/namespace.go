// SPDX-License-Identifier: Apache-2.0

package network

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/internal/spawn"
)

// namespace is an open network namespace.
type namespace struct {
	file *os.File
	nl   *netlink.Handle
}

func openNamespace(path string) (*namespace, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("network namespace: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	h, err := netlink.NewHandleAt(netns.NsHandle(f.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("network namespace %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	return &namespace{file: f, nl: h}, nil
}

func (n *namespace) close() {
	n.nl.Close()
	n.file.Close()
}

// do runs f on a thread in the namespace, for what only the caller's own
// namespace decides: the one that a socket or a tap is opened in.
func (n *namespace) do(f func() error) error {
	t := spawn.NewThread()
	defer t.Close()
	if err := t.EnterNetNS("/proc/self/fd/" + strconv.Itoa(int(n.file.Fd()))); err != nil {
		return err
	}
	return t.Do(f)
}

// undoList is a stack of what has been acquired.
type undoList struct{ steps []func() error }

func (u *undoList) push(f func() error) { u.steps = append(u.steps, f) }

// run undoes everything, the last thing first. What fails stays, to be tried again.
func (u *undoList) run() error {
	var errs []error
	var left []func() error
	for i := len(u.steps) - 1; i >= 0; i-- {
		if err := u.steps[i](); err != nil {
			errs = append(errs, err)
			left = append([]func() error{u.steps[i]}, left...)
		}
	}
	u.steps = left
	return errors.Join(errs...)
}
