// SPDX-License-Identifier: Apache-2.0

// Package agenttest is a guest agent for unit tests: it serves the agent's
// protocol in a hypervisortest.Fake's guest and runs Go functions as processes.
package agenttest

import (
	"context"
	"fmt"
	"io"
	"net"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"

	"github.com/kata-v2/kata/hypervisor/hypervisortest"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// Agent serves every machine of a Fake whose Guest is its Guest method. Its
// fields are set before the first machine starts.
type Agent struct {
	// calls that a test does not need are not implemented: they panic.
	agentpb.AgentServiceService

	// NoReady is an agent that does not dial the ready port.
	NoReady bool
	// NoStreams is an agent without stdio streams: its processes' stdio is polled.
	NoStreams bool
	// NoFiles is an agent without the service kata.Files.
	NoFiles bool
	// Before, when set, runs before every call, by its name ("StartContainer"): an
	// error is the call's, and it may wait as long as ctx lives.
	Before func(ctx context.Context, call string) error
	// OOM yields containers in which memory ran out, for GetOOMEvent; nil never does.
	OOM chan string
	// Log is served as the agent's log, to everyone who connects.
	Log string
	// Programs are what containers can run beside the built-in ones (see builtin),
	// by the first argument.
	Programs map[string]Program
	// ClockSet, when set, is called when the host sets the guest's clock.
	ClockSet func()

	mu         sync.Mutex
	calls      []string                 // guarded by mu
	requests   map[string]proto.Message // guarded by mu
	containers map[string]*container    // guarded by mu
	lastPID    uint32                   // guarded by mu
	files      map[string]string        // guarded by mu; of synced volumes: volume/path → content
	synced     chan struct{}            // guarded by mu; closed and replaced by each Sync
	streams    streams
}

// New returns an agent with nothing in it. It silences ttrpc, which logs every
// lost connection: machines end at any time here.
func New() *Agent {
	_ = log.SetLevel("panic")
	return &Agent{Programs: map[string]Program{}, requests: map[string]proto.Message{}, containers: map[string]*container{},
		files: map[string]string{}, synced: make(chan struct{})}
}

// Calls lists the calls so far, in order: the name, and the container's and
// exec's id where the call has them.
func (a *Agent) Calls() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]string(nil), a.calls...)
}

// Request is the last request of a call, nil when there was none.
func (a *Agent) Request(call string) proto.Message {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.requests[call]
}

// Containers are the ids that the guest holds.
func (a *Agent) Containers() (ids []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id := range a.containers {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// Guest is a Fake's Guest.
func (a *Agent) Guest(g *hypervisortest.Guest) {
	if err := a.serve(g); err != nil {
		fmt.Fprintln(g.Console, "agent:", err)
	}
	<-g.Done()
}

func (a *Agent) serve(g *hypervisortest.Guest) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	rpc, err := g.Listen(protocols.AgentPort)
	if err != nil {
		return err
	}
	if !a.NoStreams {
		l, err := g.Listen(protocols.StdioPort)
		if err != nil {
			return err
		}
		wg.Go(func() { a.streams.accept(l) })
	}
	if a.Log != "" {
		l, err := g.Listen(protocols.LogPort)
		if err != nil {
			return err
		}
		wg.Go(func() { a.serveLog(l) })
	}
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(a.intercept))
	if err != nil {
		return err
	}
	agentpb.RegisterAgentServiceService(server, a)
	if !a.NoFiles {
		agentpb.RegisterFilesService(server, a)
	}
	if err := g.Boot(); err != nil {
		return err
	}
	wg.Go(func() { _ = server.Serve(context.Background(), rpc) }) // ends with the machine's network
	if port, ok := g.Param(protocols.ParamReadyPort); ok && !a.NoReady {
		n, err := strconv.ParseUint(port, 10, 32)
		if err != nil {
			return err
		}
		c, err := g.Dial(uint32(n))
		if err == nil {
			_ = c.Close()
		}
	}
	<-g.Done()
	a.killAll()
	return server.Close()
}

// intercept notes every call and lets the test have its say before it.
func (a *Agent) intercept(ctx context.Context, decode ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, call ttrpc.Method) (any, error) {
	name := path.Base(info.FullMethod)
	return call(ctx, func(v any) error {
		if err := decode(v); err != nil {
			return err
		}
		entry := []string{name}
		if r, ok := v.(interface{ GetContainerId() string }); ok {
			entry = append(entry, r.GetContainerId())
			if e, ok := v.(interface{ GetExecId() string }); ok && e.GetExecId() != r.GetContainerId() && e.GetExecId() != "" {
				entry = append(entry, e.GetExecId())
			}
		}
		a.mu.Lock()
		a.calls = append(a.calls, strings.Join(entry, " "))
		a.requests[name] = v.(proto.Message)
		a.mu.Unlock()
		if a.Before != nil {
			return a.Before(ctx, name)
		}
		return nil
	})
}

func (a *Agent) serveLog(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		_, _ = io.WriteString(c, a.Log)
		_ = c.Close()
	}
}
