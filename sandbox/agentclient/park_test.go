// SPDX-License-Identifier: Apache-2.0

package agentclient

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/vsock"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// parkVM is a machine whose guest has one process, and can be parked.
type parkVM struct {
	hypervisor.VM
	agentpb.AgentServiceService
	agents chan net.Conn
	exit   chan int32 // of the process

	mu    sync.Mutex
	next  uint32              // guarded by mu
	stdio map[uint32]net.Conn // guarded by mu; the guest's ends, by port
	now   [3]net.Conn         // guarded by mu; of the process
}

// portConn is a connection from a vsock port.
type portConn struct {
	net.Conn
	port uint32
}

func (c portConn) LocalAddr() net.Addr { return vsock.Addr{CID: 2, Port: c.port} }

func (v *parkVM) Info() hypervisor.Info { return hypervisor.Info{Vsock: hypervisor.VsockSerial} }
func (v *parkVM) Done() <-chan struct{} { return nil }
func (v *parkVM) Err() error            { return nil }

func (v *parkVM) Dial(_ context.Context, port uint32) (net.Conn, error) {
	host, guest := net.Pipe()
	if port == protocols.AgentPort {
		v.agents <- guest
		return host, nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.next++
	v.stdio[v.next] = guest
	return portConn{host, v.next}, nil
}

// Accept, Addr and Close make it the listener of its agent.
func (v *parkVM) Accept() (net.Conn, error) {
	c, ok := <-v.agents
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}
func (v *parkVM) Addr() net.Addr { return vsock.Addr{} }
func (v *parkVM) Close() error   { return nil }

func (v *parkVM) WaitProcess(ctx context.Context, _ *agentpb.WaitProcessRequest) (*agentpb.WaitProcessResponse, error) {
	select {
	case s := <-v.exit:
		return &agentpb.WaitProcessResponse{Status: s}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (v *parkVM) BeginPark(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// Park takes what is left of stdin and ends the output, with a last word.
func (v *parkVM) Park(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
	c := v.conns()
	if _, err := io.WriteString(c[1], "last"); err != nil {
		return nil, err
	}
	c[1].Close()
	_, err := io.Copy(io.Discard, c[0])
	return &emptypb.Empty{}, err
}

func (v *parkVM) Attach(_ context.Context, r *agentpb.AttachRequest) (*emptypb.Empty, error) {
	if len(r.Processes) > 1 {
		return nil, errors.New("not one process")
	}
	for _, p := range r.Processes {
		v.claim(p.StdinPort, p.StdoutPort)
	}
	return &emptypb.Empty{}, nil
}

func (v *parkVM) claim(in, out uint32) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.now = [3]net.Conn{v.stdio[in], v.stdio[out]}
}

func (v *parkVM) conns() [3]net.Conn {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.now
}

// A client of a parked guest loses neither output nor the end of a process, and
// its calls wait for the next connection.
func TestParkAndAttach(t *testing.T) {
	v := &parkVM{agents: make(chan net.Conn, 1), exit: make(chan int32), stdio: map[uint32]net.Conn{}}
	srv, err := ttrpc.NewServer()
	noErr(t, err)
	agentpb.RegisterAgentServiceService(srv, v)
	agentpb.RegisterCheckpointService(srv, v)
	ctx := bound(t)
	served := make(chan error)
	go func() { served <- srv.Serve(ctx, v) }()
	t.Cleanup(func() { close(v.agents); srv.Close(); <-served })

	c, err := ConnectRestored(ctx, v)
	noErr(t, err)
	defer c.link.close()
	s, err := c.Adopt(ctx, Adopted{Container: "c", Exec: "c", Stdio: StdioWants{Stdin: true, Stdout: true}})
	noErr(t, err)
	status := make(chan int32)
	go func() {
		r, err := c.WaitProcess(ctx, &agentpb.WaitProcessRequest{})
		if err != nil {
			t.Error(err)
		}
		status <- r.GetStatus()
	}()
	for range 2 {
		go func() { _, _ = io.WriteString(v.conns()[1], "out") }()
		readN(t, s.Stdout, "out")
		noErr(t, c.Park(ctx))
		readN(t, s.Stdout, "last")
		short, cancel := context.WithCancel(ctx)
		cancel()
		if _, err := c.SignalProcess(short, &agentpb.SignalProcessRequest{}); !errors.Is(err, context.Canceled) {
			t.Errorf("a call to a parked guest: %v", err)
		}
		noErr(t, c.Attach(ctx))
		go func() { _, _ = io.WriteString(s.Stdin, "in") }()
		readN(t, v.conns()[0], "in")
	}
	v.exit <- 7
	if got := <-status; got != 7 {
		t.Errorf("exit status %d", got)
	}
	noErr(t, c.Park(ctx))
	c.link.close()
	c.stays.end()
	if _, err := s.Stdout.Read(make([]byte, 1)); err != nil { // "last" comes first
		t.Error(err)
	}
	if _, err := io.ReadAll(s.Stdout); !errors.Is(err, net.ErrClosed) {
		t.Errorf("output of a machine that ended while it was parked: %v", err)
	}
}
