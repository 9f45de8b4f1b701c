// SPDX-License-Identifier: Apache-2.0

package agentclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/kata-v2/kata/hypervisor/vsock"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// pollBytes is how much one ReadStdout asks for; upstream's runtimes use the same.
const pollBytes = 32 << 10

// Stdio are the host's ends of a process's streams; those not asked for are nil.
// Closing Stdin is the end of file of the process's stdin.
type Stdio struct {
	Stdin          io.WriteCloser
	Stdout, Stderr io.ReadCloser
	ports          [3]uint32

	container, exec string
	stays           *stays // nil for streams that end with their connections
}

// StdioWants says which streams a process has.
type StdioWants struct{ Stdin, Stdout, Stderr bool }

// OpenStdio prepares the streams of a process that is about to be created: a
// connection for each, dialled at the same time, or polling for an agent
// without streams.
func (c *Client) OpenStdio(ctx context.Context, container, exec string, w StdioWants) (*Stdio, error) {
	if !c.streams {
		return c.pollStdio(container, exec, w), nil
	}
	var (
		wg    sync.WaitGroup
		conns [3]net.Conn
		errs  [3]error
	)
	for i, want := range [3]bool{w.Stdin, w.Stdout, w.Stderr} {
		if want {
			wg.Go(func() { conns[i], errs[i] = c.vm.Dial(ctx, protocols.StdioPort) })
		}
	}
	wg.Wait()
	if err := errors.Join(errs[:]...); err != nil {
		for _, conn := range conns {
			if conn != nil {
				conn.Close()
			}
		}
		return nil, c.Err(fmt.Errorf("stdio streams: %w", err))
	}
	s := &Stdio{container: container, exec: exec}
	for i, conn := range conns {
		if conn != nil {
			s.ports[i] = sourcePort(conn)
		}
	}
	if c.stays != nil {
		c.stays.add(s, conns)
		return s, nil
	}
	if conns[0] != nil {
		s.Stdin = stdinConn{conns[0]}
	}
	if conns[1] != nil {
		s.Stdout = conns[1]
	}
	if conns[2] != nil {
		s.Stderr = conns[2]
	}
	return s, nil
}

func sourcePort(c net.Conn) uint32 {
	a, _ := c.LocalAddr().(vsock.Addr)
	return a.Port
}

// Ports are the values of the request's stdin_port, stdout_port and
// stderr_port fields; 0 stands for no stream.
func (s *Stdio) Ports() (stdin, stdout, stderr uint32) { return s.ports[0], s.ports[1], s.ports[2] }

// Close drops all streams at once.
func (s *Stdio) Close() {
	switch in := s.Stdin.(type) {
	case stdinConn:
		in.Conn.Close()
	case *inStream:
		in.drop()
	case pollWriter:
		in.cancel() // a Write that waits must not be waited for
	}
	for _, r := range []io.ReadCloser{s.Stdout, s.Stderr} {
		if r != nil {
			r.Close()
		}
	}
	if s.stays != nil {
		s.stays.remove(s)
	}
}

// stdinConn shuts only the write side: the guest still has to read what is
// under way, and closes the connection itself.
type stdinConn struct{ net.Conn }

func (s stdinConn) Close() error {
	if h, ok := s.Conn.(vsock.HalfCloser); ok {
		return h.CloseWrite()
	}
	return s.Conn.Close()
}

// pollStdio serves agents without stream ports by ReadStdout, ReadStderr and WriteStdin.
func (c *Client) pollStdio(container, exec string, w StdioWants) *Stdio {
	stream := func() poll { // each ends for itself
		ctx, cancel := context.WithCancel(context.Background())
		return poll{c: c, ctx: ctx, cancel: cancel, container: container, exec: exec}
	}
	s := &Stdio{}
	if w.Stdin {
		s.Stdin = pollWriter{stream()}
	}
	if w.Stdout {
		s.Stdout = &pollReader{poll: stream(), read: c.ReadStdout}
	}
	if w.Stderr {
		s.Stderr = &pollReader{poll: stream(), read: c.ReadStderr}
	}
	return s
}

type poll struct {
	c               *Client
	ctx             context.Context
	cancel          context.CancelFunc
	container, exec string
}

type pollReader struct {
	poll
	read func(context.Context, *agentpb.ReadStreamRequest) (*agentpb.ReadStreamResponse, error)
	rest []byte
}

func (r *pollReader) Read(p []byte) (int, error) {
	if len(r.rest) == 0 {
		resp, err := r.read(r.ctx, &agentpb.ReadStreamRequest{ContainerId: r.container, ExecId: r.exec, Len: pollBytes})
		if err != nil {
			return 0, r.c.Err(err)
		}
		if len(resp.Data) == 0 { // end of file (agent-protocol facts, part A)
			return 0, io.EOF
		}
		r.rest = resp.Data
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (r *pollReader) Close() error { r.cancel(); return nil }

type pollWriter struct{ poll }

func (w pollWriter) Write(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		resp, err := w.c.WriteStdin(w.ctx, &agentpb.WriteStreamRequest{
			ContainerId: w.container, ExecId: w.exec, Data: p[n:min(len(p), n+pollBytes)],
		})
		if err != nil {
			return n, w.c.Err(err)
		}
		n += int(resp.Len)
	}
	return n, nil
}

func (w pollWriter) Close() error {
	_, err := w.c.CloseStdin(w.ctx, &agentpb.CloseStdinRequest{ContainerId: w.container, ExecId: w.exec})
	return w.c.Err(err)
}
