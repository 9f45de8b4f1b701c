// SPDX-License-Identifier: Apache-2.0

// Package agentclient is the host's end of the wire to the guest agent: the
// ttrpc client, and the streams that carry stdio beside it.
package agentclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"syscall"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// ErrGone is what every call returns once the machine has ended; the machine's
// own reason is wrapped beside it.
var ErrGone = errors.New("the virtual machine is gone")

// An agent that knows the ready parameter dials while the guest boots. For one
// that does not, its port is dialled after fallbackAfter, then at growing
// intervals up to fallbackMax.
const (
	fallbackAfter = 3 * time.Second
	fallbackFirst = 20 * time.Millisecond
	fallbackMax   = 500 * time.Millisecond
)

// endGrace is how long the end of a machine may follow the loss of its connections.
const endGrace = time.Second

// lostErrors are those of a connection that has ended from the other side.
var lostErrors = []error{ttrpc.ErrClosed, io.EOF, net.ErrClosed, syscall.EPIPE, syscall.ECONNRESET}

// Client speaks to the agent of one machine. Its calls are those of the agent
// service; their errors are ttrpc's, with ErrGone in place of a lost connection.
type Client struct {
	agentpb.AgentServiceService
	// Files are the volumes that the guest keeps in its memory; an agent without
	// them answers Unimplemented.
	Files   agentpb.FilesService
	vm      hypervisor.VM
	link    *link
	streams bool
	unified bool
	stays   *stays // nil for a machine that is never saved
}

// Connect waits until the guest's agent serves and connects to it. It is
// bounded by ctx and by the machine's end.
func Connect(ctx context.Context, vm hypervisor.VM) (*Client, error) {
	conn, dialled, err := reach(ctx, vm)
	if err != nil {
		return nil, gone(vm, err)
	}
	c := newClient(vm)
	c.streams, c.unified = dialled, dialled
	c.link.set(ttrpc.NewClient(conn))
	if !dialled {
		if err := c.askFeatures(ctx); err != nil {
			c.link.close()
			return nil, gone(vm, err)
		}
	}
	return c, nil
}

// newClient makes one without a connection.
func newClient(vm hypervisor.VM) *Client {
	l := newLink()
	c := &Client{vm: vm, link: l, AgentServiceService: l, Files: l}
	if vm.Info().Vsock == hypervisor.VsockSerial {
		c.stays = &stays{all: map[*Stdio]bool{}}
	}
	return c
}

// askFeatures learns what an agent can do that was found by dialling it. One
// that dialled is ours and has streams.
func (c *Client) askFeatures(ctx context.Context) error {
	resp, err := c.GetGuestDetails(ctx, &agentpb.GuestDetailsRequest{})
	if err != nil {
		return fmt.Errorf("guest details: %w", err)
	}
	features := resp.GetAgentDetails().GetExtraFeatures()
	c.streams = slices.Contains(features, protocols.FeatureStdioStreams)
	c.unified = slices.Contains(features, protocols.FeatureUnified)
	return nil
}

// reach returns a connection to the agent's port, and whether the agent dialled first.
func reach(ctx context.Context, vm hypervisor.VM) (net.Conn, bool, error) {
	w, ok := vm.(hypervisor.ReadyWaiter)
	if !ok {
		c, err := dialUntilServed(ctx, vm)
		return c, false, err
	}
	ready, cancelReady := context.WithTimeout(ctx, fallbackAfter)
	err := w.WaitReady(ready)
	cancelReady()
	if err == nil {
		c, err := vm.Dial(ctx, protocols.AgentPort)
		return c, true, err
	}
	if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
		return nil, false, err
	}
	return race(ctx, vm, w)
}

// race takes whichever is first: the agent's dial, or an agent that is served
// without one. The loser has ended when it returns.
func race(ctx context.Context, vm hypervisor.VM, w hypervisor.ReadyWaiter) (net.Conn, bool, error) {
	ctx2, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		c   net.Conn
		err error
	}
	ready := make(chan error, 1)
	dialled := make(chan result, 1)
	go func() { ready <- w.WaitReady(ctx2) }()
	go func() { c, err := dialUntilServed(ctx2, vm); dialled <- result{c, err} }()
	select {
	case err := <-ready:
		cancel()
		r := <-dialled
		if err != nil {
			if r.c != nil {
				r.c.Close()
			}
			return nil, false, err
		}
		if r.c == nil {
			r.c, r.err = vm.Dial(ctx, protocols.AgentPort)
		}
		return r.c, true, r.err
	case r := <-dialled:
		cancel()
		return r.c, <-ready == nil, r.err
	}
}

func dialUntilServed(ctx context.Context, vm hypervisor.VM) (net.Conn, error) {
	for wait := fallbackFirst; ; wait = min(2*wait, fallbackMax) {
		c, err := vm.Dial(ctx, protocols.AgentPort)
		if err == nil || !errors.Is(err, syscall.ECONNREFUSED) {
			return c, err
		}
		select {
		case <-time.After(wait):
		case <-vm.Done():
			return nil, vm.Err()
		case <-ctx.Done():
			return nil, fmt.Errorf("the guest agent does not serve: %w", ctx.Err())
		}
	}
}

// Wait runs until the machine ends or ctx is done; then every call that is
// under way, or made later, fails. The caller owns the goroutine it runs in.
func (c *Client) Wait(ctx context.Context) {
	select {
	case <-c.vm.Done():
	case <-ctx.Done():
	}
	c.link.close()
	if c.stays != nil {
		c.stays.end()
	}
}

// Streams tells whether the agent pairs stdio connections with processes;
// without, stdio is polled.
func (c *Client) Streams() bool { return c.streams }

// Unified tells whether the agent holds LinuxResources.unified.
func (c *Client) Unified() bool { return c.unified }

// Err makes a call's error meaningful: a status of the agent becomes its errdefs
// kind, a lost connection the reason of the machine's end when there is one.
func (c *Client) Err(err error) error { return gone(c.vm, err) }

func gone(vm hypervisor.VM, err error) error {
	if err == nil {
		return nil
	}
	lost := slices.ContainsFunc(lostErrors, func(e error) bool { return errors.Is(err, e) })
	if lost {
		// A machine's connections are lost a moment before its end is known, and
		// only its end has a reason.
		select {
		case <-vm.Done():
		case <-time.After(endGrace):
		}
	}
	select {
	case <-vm.Done():
		if cause := vm.Err(); cause != nil {
			return fmt.Errorf("%w: %w", ErrGone, cause)
		}
		return ErrGone
	default:
		if lost {
			return fmt.Errorf("%w: connection to the guest agent lost: %w", ErrGone, err)
		}
		if _, ok := status.FromError(err); !ok {
			return err // of this side, and ToNative would lose its kind
		}
		return errgrpc.ToNative(err)
	}
}
