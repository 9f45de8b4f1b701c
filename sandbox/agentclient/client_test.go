// SPDX-License-Identifier: Apache-2.0

package agentclient_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/hypervisortest"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox/agentclient"
	"github.com/kata-v2/kata/sandbox/agentclient/agenttest"
)

const limit = 5 * time.Second

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func bounded(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	return ctx
}

// boot starts a fake machine.
func boot(t *testing.T, guest func(*hypervisortest.Guest)) hypervisor.VM {
	t.Helper()
	kernel := filepath.Join(t.TempDir(), "kernel")
	must(t, os.WriteFile(kernel, nil, 0o644))
	vm, err := (&hypervisortest.Fake{Guest: guest}).Start(bounded(t), hypervisor.Config{
		ID: "vm", Kernel: kernel, CPUs: 1, MemoryBytes: 64 << 20, ReadyParam: protocols.ParamReadyPort,
	})
	must(t, err)
	t.Cleanup(func() { must(t, vm.Stop(context.Background())) })
	return vm
}

// connect connects and runs the client's waiter, as a sandbox does.
func connect(t *testing.T, vm hypervisor.VM) *agentclient.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*limit)
	defer cancel()
	c, err := agentclient.Connect(ctx, vm)
	must(t, err)
	wait, end := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); c.Wait(wait) }()
	t.Cleanup(func() { end(); <-done })
	return c
}

// notReadyWaiter is a machine that was started without a ready listener.
func notReadyWaiter(vm hypervisor.VM) hypervisor.VM { return struct{ hypervisor.VM }{vm} }

func process(args ...string) *agentpb.Process { return &agentpb.Process{Args: args} }

var all = agentclient.StdioWants{Stdin: true, Stdout: true, Stderr: true}

// run makes and starts a container with these streams.
func run(t *testing.T, c *agentclient.Client, wants agentclient.StdioWants, args ...string) *agentclient.Stdio {
	t.Helper()
	s, err := c.OpenStdio(bounded(t), "c1", "c1", wants)
	must(t, err)
	t.Cleanup(s.Close)
	in, out, errp := s.Ports()
	_, err = c.CreateContainer(bounded(t), &agentpb.CreateContainerRequest{
		ContainerId: "c1", ExecId: "c1", OCI: &agentpb.Spec{Process: process(args...)}, StdinPort: in, StdoutPort: out, StderrPort: errp,
	})
	must(t, err)
	_, err = c.StartContainer(bounded(t), &agentpb.StartContainerRequest{ContainerId: "c1"})
	must(t, err)
	return s
}

func TestStreams(t *testing.T) {
	a := agenttest.New()
	c := connect(t, boot(t, a.Guest))
	if !c.Streams() {
		t.Error("an agent that dials has streams")
	}
	s := run(t, c, all, "cat")
	in, out, errp := s.Ports()
	if in == 0 || out == 0 || errp == 0 || in == out || out == errp || in == errp {
		t.Errorf("ports %d, %d, %d", in, out, errp)
	}
	want := strings.Repeat("x", 300_000)
	go func() { _, _ = s.Stdin.Write([]byte(want)); _ = s.Stdin.Close() }()
	got, err := io.ReadAll(s.Stdout) // the guest goes on writing after stdin's end
	must(t, err)
	if string(got) != want {
		t.Errorf("%d bytes of %d", len(got), len(want))
	}
	if slices.Contains(a.Calls(), "GetGuestDetails") {
		t.Error("a round trip for what the dial has told already")
	}
}

func TestOnlyTheWantedStreams(t *testing.T) {
	a := agenttest.New()
	c := connect(t, boot(t, a.Guest))
	s := run(t, c, agentclient.StdioWants{Stdout: true}, "echo", "x")
	if in, out, errp := s.Ports(); in != 0 || out == 0 || errp != 0 || s.Stdin != nil || s.Stderr != nil {
		t.Errorf("ports %d, %d, %d", in, out, errp)
	}
	none, err := c.OpenStdio(bounded(t), "c1", "e1", agentclient.StdioWants{})
	must(t, err)
	none.Close()
}

// An agent that never dials is found after a while and asked what it can do; a
// guest that takes longer than the fallback waits is reached in either way. The
// three wait side by side.
func TestFallbackToDialling(t *testing.T) {
	type reached struct {
		c    *agentclient.Client
		err  error
		took time.Duration
	}
	start := func(ready bool, boots time.Duration) (*agenttest.Agent, <-chan reached) {
		a := agenttest.New()
		a.NoReady = !ready
		vm := boot(t, func(g *hypervisortest.Guest) {
			time.Sleep(boots) // what is tested is a slow guest
			a.Guest(g)
		})
		res := make(chan reached, 1)
		begin := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), 2*limit)
		t.Cleanup(cancel)
		go func() { c, err := agentclient.Connect(ctx, vm); res <- reached{c, err, time.Since(begin)} }()
		return a, res
	}
	silent, found := start(false, 0)
	_, slow := start(true, 3300*time.Millisecond)
	_, slowSilent := start(false, 3300*time.Millisecond)
	r := <-found
	must(t, r.err)
	if r.took < 2*time.Second {
		t.Errorf("the fallback began after %v already", r.took)
	}
	if !r.c.Streams() || !slices.Contains(silent.Calls(), "GetGuestDetails") {
		t.Errorf("streams %v, calls %q", r.c.Streams(), silent.Calls())
	}
	for _, ch := range []<-chan reached{slow, slowSilent} {
		r := <-ch
		must(t, r.err)
		_, err := r.c.CreateSandbox(bounded(t), &agentpb.CreateSandboxRequest{})
		must(t, err)
	}
}

func TestPolling(t *testing.T) {
	a := agenttest.New()
	a.NoReady, a.NoStreams = true, true
	a.Programs["both"] = func(p *agenttest.Process) int32 {
		for range 50 {
			_, _ = p.Stdout.Write([]byte(strings.Repeat("o", 10_000)))
			_, _ = p.Stderr.Write([]byte("e"))
		}
		return 0
	}
	c := connect(t, notReadyWaiter(boot(t, a.Guest)))
	if c.Streams() {
		t.Fatal("an agent without streams has them")
	}
	s := run(t, c, all, "both")
	if in, out, errp := s.Ports(); in+out+errp != 0 {
		t.Errorf("ports %d, %d, %d", in, out, errp)
	}
	_, err := c.WaitProcess(bounded(t), &agentpb.WaitProcessRequest{ContainerId: "c1"})
	must(t, err)
	// Read after the process has ended: nothing is lost.
	for r, want := range map[io.Reader]string{s.Stdout: strings.Repeat("o", 500_000), s.Stderr: strings.Repeat("e", 50)} {
		got, err := io.ReadAll(r)
		if err != nil || string(got) != want {
			t.Errorf("%d bytes of %d, %v", len(got), len(want), err)
		}
	}
}

// Closing one polled stream leaves the others alone, and ends a read under way.
func TestPolledStreamsEndEachForItself(t *testing.T) {
	a := agenttest.New()
	a.NoReady, a.NoStreams = true, true
	c := connect(t, notReadyWaiter(boot(t, a.Guest)))
	s := run(t, c, all, "cat")
	read := make(chan error, 1)
	go func() { _, err := s.Stderr.Read(make([]byte, 1)); read <- err }()
	must(t, s.Stderr.Close())
	select {
	case err := <-read:
		if err == nil || errors.Is(err, io.EOF) {
			t.Errorf("read of a closed stream: %v", err)
		}
	case <-time.After(limit):
		t.Fatal("the read hangs")
	}
	_, err := s.Stdin.Write([]byte("still"))
	must(t, err)
	must(t, s.Stdin.Close())
	got, err := io.ReadAll(s.Stdout)
	if err != nil || string(got) != "still" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestErrors(t *testing.T) {
	a := agenttest.New()
	vm := boot(t, a.Guest)
	c := connect(t, vm)
	_, err := c.StartContainer(bounded(t), &agentpb.StartContainerRequest{ContainerId: "nobody"})
	if err := c.Err(err); !errdefs.IsNotFound(err) || errors.Is(err, agentclient.ErrGone) {
		t.Errorf("a refusal of the agent: %v", err)
	}
	if c.Err(nil) != nil {
		t.Error("no error became one")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err = c.WaitProcess(ctx, &agentpb.WaitProcessRequest{ContainerId: "nobody"})
	if err := c.Err(err); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled call: %v", err)
	}

	run(t, c, agentclient.StdioWants{}, "sleep")
	res := make(chan error, 1)
	go func() {
		_, err := c.WaitProcess(context.Background(), &agentpb.WaitProcessRequest{ContainerId: "c1"})
		res <- err
	}()
	must(t, syscall.Kill(vm.Info().PID, syscall.SIGKILL))
	select {
	case err = <-res:
	case <-time.After(limit):
		t.Fatal("a call survives the machine")
	}
	<-vm.Done()
	if err := c.Err(err); !errors.Is(err, agentclient.ErrGone) || !strings.Contains(err.Error(), "killed") {
		t.Errorf("a call that the machine's end has cut: %v", err)
	}
	_, err = c.OpenStdio(bounded(t), "c1", "c1", all)
	if !errors.Is(err, agentclient.ErrGone) {
		t.Errorf("streams of an ended machine: %v", err)
	}
}

func TestConnectEnds(t *testing.T) {
	stuck := func(g *hypervisortest.Guest) { <-g.Done() }
	deaf := func(g *hypervisortest.Guest) { _ = g.Boot(); <-g.Done() } // nobody serves
	for name, c := range map[string]struct {
		guest func(*hypervisortest.Guest)
		hide  bool
	}{"stuck": {stuck, false}, "stuck, not told": {stuck, true}, "deaf": {deaf, false}, "deaf, not told": {deaf, true}} {
		t.Run(name, func(t *testing.T) {
			vm := boot(t, c.guest)
			if c.hide {
				vm = notReadyWaiter(vm)
			}
			ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
			defer cancel()
			if _, err := agentclient.Connect(ctx, vm); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("bounded by its context: %v", err)
			}
			res := make(chan error, 1)
			go func() { _, err := agentclient.Connect(context.Background(), vm); res <- err }()
			must(t, syscall.Kill(vm.Info().PID, syscall.SIGKILL))
			select {
			case err := <-res:
				if !errors.Is(err, agentclient.ErrGone) || !strings.Contains(err.Error(), "killed") {
					t.Errorf("bounded by the machine's end: %v", err)
				}
			case <-time.After(limit):
				t.Fatal("Connect survives the machine")
			}
		})
	}
}

// A stdio port that nobody serves is an error, and nothing is left open.
func TestStreamsRefused(t *testing.T) {
	a := agenttest.New()
	a.NoStreams = true // and yet it dials, which promises streams
	c := connect(t, boot(t, a.Guest))
	_, err := c.OpenStdio(bounded(t), "c1", "c1", all)
	if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%v; want ECONNREFUSED", err)
	}
}
