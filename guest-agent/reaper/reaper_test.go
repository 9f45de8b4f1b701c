// SPDX-License-Identifier: Apache-2.0

package reaper

import (
	"context"
	"fmt"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"
)

func running(t *testing.T) *Reaper {
	t.Helper()
	r := New()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); r.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return r
}

func wait(t *testing.T, ch <-chan Status) Status {
	t.Helper()
	select {
	case st := <-ch:
		return st
	case <-time.After(5 * time.Second):
		t.Fatal("no status within 5 s")
		return Status{}
	}
}

func sh(t *testing.T, r *Reaper, script string, files ...uintptr) (int, <-chan Status) {
	t.Helper()
	pid, ch, err := r.Start("/bin/sh", []string{"sh", "-c", script}, &syscall.ProcAttr{Env: os.Environ(), Files: files})
	if err != nil {
		t.Fatal(err)
	}
	return pid, ch
}

func TestStatus(t *testing.T) {
	r := running(t)
	for _, c := range []struct {
		script string
		want   Status
	}{
		{"exit 0", Status{}},
		{"exit 7", Status{Code: 7}},
		{"kill -TERM $$", Status{Code: 143, Signaled: true}},
		{"kill -KILL $$", Status{Code: 137, Signaled: true}},
	} {
		if _, ch := sh(t, r, c.script); wait(t, ch) != c.want {
			t.Errorf("%s: not %+v", c.script, c.want)
		}
	}
}

// TestOrphanBeforeClaim: an engine's grandchild that is dead and reaped before
// its pid was read still yields its status.
func TestOrphanBeforeClaim(t *testing.T) {
	r := New()
	l := r.Launch()
	r.deliver(4242, Status{Code: 9})
	if st := wait(t, l.Claim(4242)); st.Code != 9 {
		t.Errorf("code %d, want 9", st.Code)
	}
	r.deliver(4243, Status{Code: 1})
	l.Done()
	l.Done()
	if len(r.early) != 0 || r.launches != 0 {
		t.Errorf("after Done: early %v, launches %d", r.early, r.launches)
	}
	r.deliver(4244, Status{})
	if len(r.early) != 0 {
		t.Error("a status was kept with no launch open")
	}
}

func TestManyAtOnce(t *testing.T) {
	r := running(t)
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			_, ch, err := r.Start("/bin/sh", []string{"sh", "-c", fmt.Sprintf("exit %d", i)}, &syscall.ProcAttr{})
			if err != nil {
				t.Error(err)
				return
			}
			if st := <-ch; st.Code != i {
				t.Errorf("process %d: code %d", i, st.Code)
			}
		}()
	}
	wg.Wait()
	if len(r.waiters) != 0 {
		t.Errorf("waiters left: %d", len(r.waiters))
	}
}

func TestStartError(t *testing.T) {
	r := running(t)
	if _, _, err := r.Start("/nonexistent", []string{"x"}, &syscall.ProcAttr{}); err == nil {
		t.Fatal("no error")
	}
	if r.launches != 0 {
		t.Error("launch left open")
	}
}
