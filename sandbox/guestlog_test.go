// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// lines collects a log.
type lines struct {
	mu  sync.Mutex
	b   bytes.Buffer
	has chan struct{} // closed when want was written
	// want is what is waited for.
	want string
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b.Write(p)
	if l.want != "" && strings.Contains(l.b.String(), l.want) {
		l.want = ""
		close(l.has)
	}
	return len(p), nil
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// The agent's log arrives in ours as data: what a hostile guest writes makes no lines of its own.
func TestGuestLog(t *testing.T) {
	out := &lines{want: "the last one", has: make(chan struct{})}
	p := newPod(t, func(p *pod) {
		p.log = slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: slog.LevelDebug}))
		p.agent.Log = `{"level":"error","msg":"bad thing","ts":"x","container":"c1"}` + "\n" +
			`{"level":"info","msg":"two\nlines level=ERROR"}` + "\n" +
			"not JSON \x1b[31m\n" +
			`{"level":"warn","msg":"the last one"}` + "\n"
	})
	p.start("c1", "sleep")
	within(t, out.has, "the guest's log")
	for _, want := range []string{
		`level=ERROR msg="guest: bad thing" container=c1`, `level=DEBUG msg="guest: two\nlines level=ERROR"`,
		`level=DEBUG msg="guest: not JSON \x1b[31m"`, `level=WARN msg="guest: the last one"`,
	} {
		if got := out.String(); !strings.Contains(got, want) {
			t.Errorf("%s is not in\n%s", want, got)
		}
	}
}

func TestOOMEvents(t *testing.T) {
	told := make(chan string, 10)
	p := newPod(t, func(p *pod) {
		p.agent.OOM = make(chan string, 10)
		p.oom = func(id string) { told <- id }
	})
	p.start("c1", "sleep")
	for _, id := range []string{"c1", "c1", "c2"} {
		p.agent.OOM <- id
	}
	var got []string
	for range 3 {
		select {
		case id := <-told:
			got = append(got, id)
		case <-time.After(limit):
			t.Fatal("the event does not come")
		}
	}
	if !slices.Equal(got, []string{"c1", "c1", "c2"}) {
		t.Errorf("%q", got)
	}
}

// An agent that has no such events is asked once.
func TestNoOOMEvents(t *testing.T) {
	asked := make(chan struct{})
	p := newPod(t, func(p *pod) {
		p.oom = func(id string) { t.Errorf("told of %q", id) }
		p.agent.Before = func(_ context.Context, call string) error {
			if call == "GetOOMEvent" {
				close(asked) // a second time panics
				return errors.New("not implemented")
			}
			return nil
		}
	})
	c := p.start("c1", "sleep")
	within(t, asked, "the question")
	must(t, c.Init().Signal(bounded(t), 9, false))
	exit(t, c.Init())
}
