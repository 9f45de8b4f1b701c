// SPDX-License-Identifier: Apache-2.0

package agentclient

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// Park ends everything between host and guest in order, so that the machine can be
// detached and saved: calls that are under way are waited for, later ones wait
// until Attach, and nothing is lost of what processes write and read. Calls that
// wait for something begin anew. On an error the streams may be parked in part:
// Attach is for that case too.
func (c *Client) Park(ctx context.Context) error {
	if c.stays == nil {
		return fmt.Errorf("this machine's streams cannot be parked: %w", errdefs.ErrFailedPrecondition)
	}
	p, err := c.link.hold(ctx)
	if err != nil {
		return fmt.Errorf("park: wait for calls to the guest: %w", err)
	}
	all := c.stays.list()
	for _, s := range all {
		if in := s.in(); in != nil {
			in.park()
		}
		for _, o := range s.outs() {
			o.park()
		}
	}
	if _, err := p.checkpoint.BeginPark(ctx, &emptypb.Empty{}); err != nil {
		c.link.release()
		return fmt.Errorf("park: %w", c.Err(err))
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	run := func(f func() error) {
		wg.Go(func() {
			err := f()
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		})
	}
	cctx, cancel := context.WithCancel(ctx)
	defer cancel()
	run(func() error {
		_, err := p.checkpoint.Park(ctx, &emptypb.Empty{})
		if err != nil {
			cancel()
		}
		return c.Err(err)
	})
	for _, s := range all {
		if in := s.in(); in != nil {
			run(func() error { return in.end(cctx) })
		}
		for _, o := range s.outs() { // also of those whose reader is stuck: the guest waits for them
			run(func() error { return o.collect(cctx) })
		}
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		c.link.release()
		return fmt.Errorf("park: %w", err)
	}
	for _, s := range all {
		if in := s.in(); in != nil {
			in.leave()
		}
	}
	c.link.drop()
	return nil
}

// Attach connects to the agent of a guest that goes on after Park, and gives the
// processes' streams new connections. After a Park that failed the agent's
// connection is still there.
func (c *Client) Attach(ctx context.Context) error {
	if p := c.link.present(); p != nil {
		return c.attachStreams(ctx, p.checkpoint, c.stays.list())
	}
	conn, err := c.vm.Dial(ctx, protocols.AgentPort)
	if err != nil {
		return c.Err(fmt.Errorf("attach: %w", err))
	}
	rpc := ttrpc.NewClient(conn)
	if err := c.attachStreams(ctx, agentpb.NewCheckpointClient(rpc), c.stays.list()); err != nil {
		rpc.Close()
		return err
	}
	c.link.set(rpc)
	return nil
}

func (c *Client) attachStreams(ctx context.Context, agent agentpb.CheckpointService, all []*Stdio) (err error) {
	conns := make([][3]net.Conn, len(all))
	defer func() {
		if err == nil {
			return
		}
		for _, three := range conns {
			for _, conn := range three {
				if conn != nil {
					conn.Close()
				}
			}
		}
	}()
	req := &agentpb.AttachRequest{}
	for i, s := range all {
		in := s.in()
		for k, want := range [3]bool{in != nil && in.wanted(), s.Stdout != nil, s.Stderr != nil} {
			if !want {
				continue
			}
			if conns[i][k], err = c.vm.Dial(ctx, protocols.StdioPort); err != nil {
				return c.Err(fmt.Errorf("attach: stdio streams: %w", err))
			}
		}
		req.Processes = append(req.Processes, &agentpb.AttachedProcess{
			ContainerId: s.container, ExecId: s.exec,
			StdinPort: portOf(conns[i][0]), StdoutPort: portOf(conns[i][1]), StderrPort: portOf(conns[i][2]),
		})
	}
	if _, err := agent.Attach(ctx, req); err != nil {
		return fmt.Errorf("attach: %w", c.Err(err))
	}
	for i, s := range all {
		if in := s.in(); in != nil {
			in.attach(conns[i][0])
			if conns[i][0] != nil && !in.wanted() { // ended meanwhile
				_ = closeWrite(conns[i][0])
			}
		}
		if o, ok := s.Stdout.(*outStream); ok {
			o.attach(conns[i][1])
		}
		if o, ok := s.Stderr.(*outStream); ok {
			o.attach(conns[i][2])
		}
	}
	return nil
}

func portOf(c net.Conn) uint32 {
	if c == nil {
		return 0
	}
	return sourcePort(c)
}

// Adopted is a process of a restored guest.
type Adopted struct {
	// Container and Exec name it in the guest.
	Container, Exec string
	// Stdio says which streams it is to have.
	Stdio StdioWants
}

// ConnectRestored connects to the agent of a restored guest, whose streams are
// parked: those of a process flow from Adopt on.
func ConnectRestored(ctx context.Context, vm hypervisor.VM) (*Client, error) {
	c := newClient(vm)
	if c.stays == nil {
		return nil, fmt.Errorf("vsock backend is %q: a guest is restored with %q only: %w", vm.Info().Vsock, hypervisor.VsockSerial, errdefs.ErrFailedPrecondition)
	}
	c.streams, c.unified = true, true
	return c, c.Attach(ctx)
}

// Adopt gives a process of a restored guest its streams.
func (c *Client) Adopt(ctx context.Context, a Adopted) (*Stdio, error) {
	p, err := c.link.get(ctx, true)
	if err != nil {
		return nil, c.Err(err)
	}
	defer c.link.done()
	s := &Stdio{container: a.Container, exec: a.Exec}
	c.stays.expect(s, a.Stdio)
	if err := c.attachStreams(ctx, p.checkpoint, []*Stdio{s}); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}
