// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// slowExec puts answer before the launch of an exec in the guest; hold tells that
// it is under way, and signalled has an entry for each signal that the guest was sent.
func slowExec(p *pod, answer func(ctx context.Context, signalled <-chan struct{}) error) (hold, signalled chan struct{}) {
	hold, signalled = make(chan struct{}), make(chan struct{}, 8)
	p.agent.Before = func(ctx context.Context, call string) error {
		switch call {
		case "ExecProcess":
			close(hold)
			return answer(ctx, signalled)
		case "SignalProcess":
			signalled <- struct{}{}
		}
		return nil
	}
	return hold, signalled
}

// TestKillWhileLaunched: KILL of an exec that the guest does not know yet is no
// error, and the process does not outlive its launch.
func TestKillWhileLaunched(t *testing.T) {
	p := newPod(t)
	hold, _ := slowExec(p, func(_ context.Context, signalled <-chan struct{}) error {
		<-signalled // TERM
		<-signalled // KILL
		return nil
	})
	c := p.start("c1", "sleep")
	e := p.exec(c, "e1", "sleep")
	started := make(chan error, 1)
	ctx := bounded(t)
	go func() { started <- c.StartExec(ctx, e) }()
	within(t, hold, "the launch")
	is(t, "TERM", e.Signal(ctx, uint32(unix.SIGTERM), false), errdefs.IsNotFound)
	must(t, e.Signal(ctx, uint32(unix.SIGKILL), false))
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	if x := exit(t, e); x.Status != 137 {
		t.Errorf("exit %+v; want 137", x)
	}
	must(t, c.DeleteExec(e))
}

// TestKilledLaunchFails: a guest that gives the launch up when it is killed.
func TestKilledLaunchFails(t *testing.T) {
	p := newPod(t)
	hold, _ := slowExec(p, func(_ context.Context, signalled <-chan struct{}) error {
		<-signalled
		return errors.New("killed before it ran")
	})
	c := p.start("c1", "sleep")
	e := p.exec(c, "e1", "sleep")
	started := make(chan error, 1)
	ctx := bounded(t)
	go func() { started <- c.StartExec(ctx, e) }()
	within(t, hold, "the launch")
	must(t, e.Signal(ctx, uint32(unix.SIGKILL), false))
	if err := <-started; err == nil {
		t.Error("a launch that was killed succeeds")
	}
	if x := exit(t, e); x.Status != 137 {
		t.Errorf("exit %+v; want 137", x)
	}
	must(t, c.DeleteExec(e))
}

// TestAbandonedLaunch: a caller that is gone leaves nothing running in the guest.
func TestAbandonedLaunch(t *testing.T) {
	p := newPod(t)
	hold, signalled := slowExec(p, func(ctx context.Context, _ <-chan struct{}) error { <-ctx.Done(); return ctx.Err() })
	c := p.start("c1", "sleep")
	e := p.exec(c, "e1", "sleep")
	ctx, giveUp := context.WithCancel(bounded(t))
	started := make(chan error, 1)
	go func() { started <- c.StartExec(ctx, e) }()
	within(t, hold, "the launch")
	giveUp()
	if err := <-started; !errors.Is(err, context.Canceled) {
		t.Errorf("start: %v", err)
	}
	within(t, signalled, "a signal to the guest")
	if calls := p.agent.Calls(); !slices.Contains(calls, "SignalProcess c1 e1") {
		t.Errorf("the guest was asked for %q", calls)
	}
	must(t, c.DeleteExec(e))
}

// TestHungGuest: a guest that does not even take a KILL is ended, so that the pod
// can be removed.
func TestHungGuest(t *testing.T) {
	defer func(d time.Duration) { killAnswer = d }(killAnswer)
	killAnswer = time.Millisecond
	p := newPod(t)
	over := make(chan struct{})
	t.Cleanup(func() { close(over) })
	p.agent.Before = func(_ context.Context, call string) error {
		if call == "SignalProcess" {
			<-over
		}
		return nil
	}
	c := p.start("c1", "sleep")
	neighbour := p.start("c2", "sleep")
	must(t, c.Init().Signal(bounded(t), uint32(unix.SIGKILL), true))
	for _, x := range []*Process{c.Init(), neighbour.Init()} {
		if e := exit(t, x); e.Status != killedStatus {
			t.Errorf("exit %+v", e)
		}
	}
	within(t, p.Ended(), "the end")
	if err := p.Reason(); !errors.Is(err, errKillAnswer) {
		t.Errorf("reason %v", err)
	}
	must(t, p.Stop(bounded(t)))
}
