// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/hypervisortest"
	"github.com/kata-v2/kata/sandbox/agentclient"
)

// The first creation boots the machine, the others wait for it.
func TestConcurrentCreates(t *testing.T) {
	booting, goOn := make(chan struct{}), make(chan struct{})
	p := newPod(t, func(p *pod) {
		p.fake.BeforeStart = func(context.Context, hypervisor.Config) error { close(booting); <-goOn; return nil }
	})
	const n = 8
	errs := make(chan error, n)
	for i := range n {
		cc := p.container(string(rune('a'+i)), "exit", "0")
		go func() { _, err := p.CreateContainer(bounded(t), cc); errs <- err }()
	}
	within(t, booting, "the boot")
	select {
	case err := <-errs:
		t.Fatalf("a creation ended before the machine was up: %v", err)
	default:
	}
	close(goOn)
	for range n {
		must(t, <-errs)
	}
	if b := p.boots.Load(); b != 1 {
		t.Errorf("%d machines", b)
	}
	if got := p.agent.Containers(); len(got) != n {
		t.Errorf("the guest holds %q", got)
	}
}

func TestBootFailure(t *testing.T) {
	for name, change := range map[string]func(*pod){
		"hypervisor": func(p *pod) {
			p.fake.BeforeStart = func(context.Context, hypervisor.Config) error { return errTest }
		},
		"virtiofsd":     func(p *pod) { p.config.QEMU.VirtioFSDaemon = "/nonexistent/virtiofsd" },
		"guest crashes": func(p *pod) { p.fake.Guest = func(g *hypervisortest.Guest) { g.Crash(errTest.Error()) } },
		"agent": func(p *pod) {
			p.agent.Before = func(_ context.Context, call string) error {
				if call == "CreateSandbox" {
					return errTest
				}
				return nil
			}
		},
		"kernel": func(p *pod) { p.config.QEMU.Kernel = "/nonexistent/kernel" },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPod(t, change)
			var wg sync.WaitGroup
			for _, id := range []string{"a", "b"} {
				cc := p.container(id, "true")
				wg.Go(func() {
					if _, err := p.CreateContainer(bounded(t), cc); err == nil {
						t.Errorf("%s was created", id)
					}
				})
			}
			wg.Wait()
			within(t, p.Ended(), "the sandbox's end")
			_, err := p.CreateContainer(bounded(t), p.container("c", "true"))
			want := errTest.Error()
			switch name {
			case "virtiofsd", "kernel":
				want = "/nonexistent/" + name
			}
			if !errors.Is(err, ErrStopped) || !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), want) {
				t.Errorf("a later creation: %v; want %q", err, want)
			}
			if p.State() != Stopped || p.PID() != 0 || !p.Empty() {
				t.Errorf("%v, pid %d, empty %v", p.State(), p.PID(), p.Empty())
			}
		})
	}
}

// busy is a pod with a process in every state that waits.
func busy(t *testing.T, p *pod) (all []*Process) {
	t.Helper()
	created, running, paused := p.create("created", "sleep"), p.start("running", "sleep"), p.start("paused", "sleep")
	must(t, paused.Pause(bounded(t)))
	exec, idle := p.exec(running, "e1", "sleep"), p.exec(running, "e2", "sleep")
	must(t, running.StartExec(bounded(t), exec))
	return []*Process{created.Init(), running.Init(), paused.Init(), exec, idle}
}

// ended checks that everyone learns of the machine's end at once, with a reason.
func ended(t *testing.T, p *pod, all []*Process, reason string) {
	t.Helper()
	for _, x := range all {
		if e := exit(t, x); e.Status != 137 || e.At.IsZero() {
			t.Errorf("process %s: %+v", x.id, e)
		}
	}
	within(t, p.Ended(), "the sandbox's end")
	for _, id := range []string{"created", "running", "paused"} {
		c, err := p.Container(id)
		must(t, err)
		for what, err := range map[string]error{
			"pause": c.Pause(bounded(t)), "update": c.Update(bounded(t), nil), "start": c.Start(bounded(t)),
		} {
			if !errors.Is(err, ErrStopped) || !strings.Contains(err.Error(), reason) {
				t.Errorf("%s of %s: %v; want %q", what, id, err, reason)
			}
		}
		must(t, c.Delete(bounded(t)))
	}
	_, err := p.CreateContainer(bounded(t), p.container("late", "true"))
	if !errors.Is(err, ErrStopped) || !strings.Contains(err.Error(), reason) {
		t.Errorf("a later creation: %v; want %q", err, reason)
	}
	if !p.Empty() || p.State() != Stopped {
		t.Errorf("%v, empty %v", p.State(), p.Empty())
	}
}

func TestVMMKilled(t *testing.T) {
	p := newPod(t)
	all := busy(t, p)
	kill(t, p.PID())
	ended(t, p, all, "killed")
}

func TestGuestCrash(t *testing.T) {
	guest := make(chan *hypervisortest.Guest, 1)
	p := newPod(t)
	p.fake.Guest = func(g *hypervisortest.Guest) { guest <- g; p.agent.Guest(g) }
	all := busy(t, p)
	(<-guest).Crash("Kernel panic: test")
	ended(t, p, all, "Kernel panic: test")
}

func TestVirtiofsdKilled(t *testing.T) {
	p := newPod(t)
	all := busy(t, p)
	kill(t, p.m.daemon.Load().PID())
	ended(t, p, all, "virtiofsd ended: signal: killed")
}

// A call that is under way when the machine ends ends with it.
func TestCallsEndWithTheMachine(t *testing.T) {
	called := make(chan struct{})
	p := newPod(t, func(p *pod) {
		p.agent.Before = func(ctx context.Context, call string) error {
			if call == "StatsContainer" {
				close(called)
				<-ctx.Done()
			}
			return nil
		}
	})
	c := p.start("c1", "sleep")
	res := make(chan error, 1)
	go func() { _, err := c.Stats(context.Background()); res <- err }()
	within(t, called, "the call")
	kill(t, p.PID())
	select {
	case err := <-res:
		if !errors.Is(err, agentclient.ErrGone) {
			t.Errorf("%v", err)
		}
	case <-time.After(limit):
		t.Fatal("the call hangs")
	}
}

func TestStopIsIdempotent(t *testing.T) {
	p := newPod(t)
	all := busy(t, p)
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if err := p.Stop(bounded(t)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, x := range all {
		exit(t, x)
	}
	must(t, p.Stop(bounded(t)))
	_, err := p.CreateContainer(bounded(t), p.container("late", "true"))
	if !errors.Is(err, ErrStopped) {
		t.Errorf("a later creation: %v", err)
	}
}

func TestStopBeforeStart(t *testing.T) {
	p := newPod(t)
	must(t, p.Stop(bounded(t)))
	must(t, p.Stop(bounded(t)))
	within(t, p.Ended(), "the end")
	_, err := p.CreateContainer(bounded(t), p.container("late", "true"))
	if !errors.Is(err, ErrStopped) || p.boots.Load() != 0 {
		t.Errorf("a later creation: %v; %d machines", err, p.boots.Load())
	}
}

// A machine that does not come up is not waited for.
func TestStopDuringBoot(t *testing.T) {
	up := make(chan struct{}, 1)
	p := newPod(t, func(p *pod) {
		p.fake.Guest = func(g *hypervisortest.Guest) { up <- struct{}{}; <-g.Done() } // never becomes ready
	})
	created := make(chan error, 1)
	cc := p.container("c1", "true")
	go func() { _, err := p.CreateContainer(context.Background(), cc); created <- err }()
	<-up
	begin := time.Now()
	if err := p.Stop(bounded(t)); err != nil {
		t.Errorf("Stop: %v", err)
	}
	if d := time.Since(begin); d > limit/2 {
		t.Errorf("Stop took %v", d)
	}
	within(t, p.Ended(), "the end")
	select {
	case err := <-created:
		if err == nil {
			t.Error("the container was created")
		}
	case <-time.After(limit):
		t.Fatal("the creation hangs")
	}
}

// An agent that hangs in a call is bounded by the caller's context, and what it
// was asked for is not there afterwards.
func TestAgentThatHangs(t *testing.T) {
	for _, hangs := range []string{"CreateContainer", "CreateSandbox", "StartContainer", "ExecProcess"} {
		t.Run(hangs, func(t *testing.T) {
			p := newPod(t, func(p *pod) {
				p.agent.Before = func(_ context.Context, call string) error {
					if call == hangs {
						<-t.Context().Done() // it does not look at the caller's deadline
					}
					return nil
				}
			})
			ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
			defer cancel()
			var err error
			if strings.HasPrefix(hangs, "Create") {
				_, err = p.CreateContainer(ctx, p.container("c1", "sleep"))
			} else {
				c := p.create("c1", "sleep")
				if hangs == "StartContainer" {
					err = c.Start(ctx)
				} else {
					must(t, c.Start(bounded(t)))
					e := p.exec(c, "e1", "sleep")
					err = c.StartExec(ctx, e)
					exit(t, e)
				}
			}
			if !errors.Is(err, context.DeadlineExceeded) && !errdefs.IsDeadlineExceeded(err) {
				t.Errorf("%v; want the deadline", err)
			}
			if hangs == "CreateContainer" && !p.Empty() {
				t.Error("the container is left")
			}
		})
	}
}

// The guest that does not sync is not waited for longer than Stop's context.
func TestStopWithAGuestThatHangs(t *testing.T) {
	p := newPod(t, func(p *pod) {
		p.agent.Before = func(ctx context.Context, call string) error {
			if call == "DestroySandbox" {
				<-ctx.Done()
			}
			return nil
		}
	})
	p.start("c1", "sleep")
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	begin := time.Now()
	_ = p.Stop(ctx) // may say that it was late; the machine ends in any case
	within(t, p.Ended(), "the end")
	if d := time.Since(begin); d > time.Second {
		t.Errorf("Stop took %v", d)
	}
}

// stops tells for each Stop of its machines whether it was to kill.
type stops struct {
	hypervisor.VM
	kill chan bool
}

func (s stops) Stop(ctx context.Context) error {
	s.kill <- ctx.Err() != nil
	return s.VM.Stop(ctx)
}

type stopsTold struct {
	hypervisor.Hypervisor
	kill chan bool
}

func (h stopsTold) Start(ctx context.Context, c hypervisor.Config) (hypervisor.VM, error) {
	vm, err := h.Hypervisor.Start(ctx, c)
	if err != nil {
		return nil, err
	}
	return stops{vm, h.kill}, nil
}

// A machine is killed once its guest has synced, and asked to end where it has disks to
// flush or the guest has not answered.
func TestHowAMachineEnds(t *testing.T) {
	for name, c := range map[string]struct {
		e     end
		fails bool
		kill  bool
	}{
		"no disks":       {e: end{}, kill: true},
		"disks":          {e: end{disks: true}},
		"no sync":        {e: end{}, fails: true},
		"with processes": {e: end{containers: true}, kill: true},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPod(t, func(p *pod) {
				p.agent.Before = func(_ context.Context, call string) error {
					if c.fails && call == "DestroySandbox" {
						return errors.New("no")
					}
					return nil
				}
			})
			kill := make(chan bool, 10)
			p.Sandbox.o.Hypervisor = stopsTold{p.fake, kill}
			p.start("c1", "sleep")
			p.m.stop(bounded(t), c.e, p.o.Log)
			if got := <-kill; got != c.kill {
				t.Errorf("killed: %t; want %t", got, c.kill)
			}
			within(t, p.Ended(), "the end")
		})
	}
}

// plain hides the optional abilities of its machines.
type plain struct{ hypervisor.Hypervisor }

func (h plain) Start(ctx context.Context, c hypervisor.Config) (hypervisor.VM, error) {
	vm, err := h.Hypervisor.Start(ctx, c)
	if err != nil {
		return nil, err
	}
	return struct{ hypervisor.VM }{vm}, nil
}

// An upstream agent has neither the ready dial nor streams: its output is
// polled, and none is lost, however soon the process ends.
func TestPolledOutput(t *testing.T) {
	p := newPod(t, func(p *pod) {
		p.agent.NoReady, p.agent.NoStreams = true, true
	})
	p.Sandbox.o.Hypervisor = plain{p.fake}
	spec := p.container("c1", "cat")
	c, err := p.CreateContainer(bounded(t), spec)
	must(t, err)
	must(t, c.Start(bounded(t)))
	io := c.Init().Stdio()
	want := strings.Repeat("0123456789abcdef", 40_000)
	got := make(chan string, 1)
	go func() { got <- output(t, io.Stdout) }()
	_, err = io.Stdin.Write([]byte(want))
	must(t, err)
	must(t, io.Stdin.Close())
	if e := exit(t, c.Init()); e.Status != 0 {
		t.Errorf("exit %+v", e)
	}
	if g := <-got; g != want {
		t.Errorf("%d bytes of %d came back", len(g), len(want))
	}
	if e := output(t, io.Stderr); e != "" {
		t.Errorf("stderr %q", e)
	}
	if calls := p.agent.Calls(); !slices.Contains(calls, "GetGuestDetails") || !slices.Contains(calls, "WriteStdin c1") {
		t.Errorf("calls %q", calls)
	}
}

// The ledger names the machine's processes while it runs.
func TestLedgerNamesProcesses(t *testing.T) {
	p := newPod(t)
	p.create("c1", "sleep")
	data, err := os.ReadFile(p.state + "/key/ledger")
	must(t, err)
	for _, name := range []string{"fake-vmm", "virtiofsd"} {
		if !strings.Contains(string(data), name) {
			t.Errorf("%s is not in the ledger: %s", name, data)
		}
	}
}

// Whatever is under way when the machine ends: every process that was made ends,
// and every call returns.
func TestEverythingAtOnce(t *testing.T) {
	for range 5 {
		p := newPod(t)
		c := p.start("c1", "sleep")
		var wg sync.WaitGroup
		var mu sync.Mutex
		var all []*Process
		for i := range 4 {
			wg.Go(func() {
				for n := range 200 {
					e, err := c.Exec(fmt.Sprintf("e%d-%d", i, n), process("sleep"), agentclient.StdioWants{Stdout: true})
					if err != nil {
						return
					}
					mu.Lock()
					all = append(all, e)
					mu.Unlock()
					if c.StartExec(context.Background(), e) != nil {
						return
					}
				}
			})
			wg.Go(func() {
				for n := range 200 {
					d, err := p.CreateContainer(context.Background(), p.container(fmt.Sprintf("d%d-%d", i, n), "sleep"))
					if err != nil {
						return
					}
					mu.Lock()
					all = append(all, d.Init())
					mu.Unlock()
				}
			})
		}
		time.Sleep(30 * time.Millisecond) // the load builds up
		kill(t, p.PID())
		done := make(chan struct{})
		go func() { wg.Wait(); close(done) }()
		within(t, done, "the end of the calls")
		within(t, p.Ended(), "the sandbox's end")
		for _, x := range all {
			if e := exit(t, x); e.Status != 137 && e.Status != 255 {
				t.Errorf("process %s: %+v", x.id, e)
			}
		}
	}
}
