// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kata-v2/kata/sandbox/ledger"
)

// fixture is a place of the test's own in the machine's real cgroups, with a
// process that stands for the shim.
type fixture struct {
	*testing.T
	host   Host
	parent string // cgroup in which pods are asked for; the test's own
	led    *ledger.Ledger
	child  *exec.Cmd
	log    *bytes.Buffer
	dial   func(context.Context) (Systemd, error)
	// path is what the engine asks for.
	path string
}

// hosts are the versions that this machine has: version 1, and the bare version 2
// beside it or the whole of it.
func hosts(t *testing.T) map[string]Host {
	t.Helper()
	h, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]Host{}
	if h.V2 != nil {
		out["v2"] = h
	}
	if len(h.V1) > 0 {
		out["v1"] = h
	}
	for _, m := range h.Tracking {
		if len(m.Controllers) == 0 {
			out["v2"] = Host{V2: &m}
		}
	}
	if len(out) == 0 {
		t.Fatal("this machine has no cgroups: the tests need them")
	}
	return out
}

func newFixture(t *testing.T, h Host) *fixture {
	t.Helper()
	f := &fixture{T: t, host: h, log: &bytes.Buffer{}}
	f.parent = fmt.Sprintf("/kata-test-%d-%x", os.Getpid(), time.Now().UnixNano()&0xffffff)
	f.path = f.parent + "/c1"
	led, err := ledger.Create(filepath.Join(t.TempDir(), "state"), "key", ledger.Meta{Sandbox: "pod"})
	f.must(err)
	f.led = led
	f.child = f.sleeper()
	t.Cleanup(func() {
		for _, m := range h.all() {
			if left, _ := filepath.Glob(filepath.Join(m.Mount, f.parent+"*")); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		}
		if err := f.led.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(f.log)
		}
	})
	return f
}

func (f *fixture) must(err error) {
	f.Helper()
	if err != nil {
		f.Fatal(err)
	}
}

func (f *fixture) sleeper() *exec.Cmd { return f.start(exec.Command("sleep", "1000")) }

func (f *fixture) start(cmd *exec.Cmd) *exec.Cmd {
	f.Helper()
	f.must(cmd.Start())
	f.Cleanup(func() {
		cmd.Process.Kill() //nolint:errcheck // it may be gone
		cmd.Wait()         //nolint:errcheck // it was killed
	})
	return cmd
}

func (f *fixture) request() Request { return Request{Pod: "p1", Path: f.path} }

func (f *fixture) open(r Request) (*Group, error) {
	f.Helper()
	p, err := f.host.Plan(r)
	f.must(err)
	return f.host.Open(f.Context(), p, Options{
		PID: f.child.Process.Pid, Ledger: f.led, Log: slog.New(slog.NewTextHandler(f.log, nil)), Dial: f.dial,
	})
}

// has tells whether a process is in a directory.
func has(dir string, pid int) bool {
	pids, _ := members(dir)
	for _, p := range pids {
		if p == pid {
			return true
		}
	}
	return false
}

// where is /proc/<pid>/cgroup without the ids.
func (f *fixture) where(pid int) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	f.must(err)
	return string(data)
}

// conformance is what every form of a pod's cgroup does.
func conformance(t *testing.T, begin func(*testing.T) *fixture) {
	t.Run("Life", func(t *testing.T) {
		f := begin(t)
		pid := f.child.Process.Pid
		before := f.where(pid)
		g, err := f.open(f.request())
		f.must(err)
		other := f.sleeper()
		for _, d := range g.plan.Dirs {
			if !has(d.Path, pid) {
				t.Errorf("the process is not in %s", d.Path)
			}
			f.must(writeFile(strconv.Itoa(other.Process.Pid), d.Path, "cgroup.procs"))
		}
		free := f.sleeper()
		for _, d := range g.plan.Dirs {
			f.must(writeFile(strconv.Itoa(free.Process.Pid), d.Path, "cgroup.procs"))
		}
		f.must(g.SendHome(free.Process.Pid))
		if got := f.where(free.Process.Pid); got != before {
			t.Errorf("a process that was sent home is in\n%s\nnot in\n%s", got, before)
		}
		if n := len(f.led.Entries()); n < len(g.plan.Dirs) {
			t.Errorf("%d entries in the ledger", n)
		}
		if err := g.OOM(); err != nil {
			t.Errorf("OOM of an idle group: %v", err)
		}
		f.must(g.Close(f.Context()))
		if after := f.where(pid); after != before {
			t.Errorf("the process was in\n%s\nand is in\n%s", before, after)
		}
		if strings.Contains(f.where(other.Process.Pid), f.parent) {
			t.Error("another process was not moved out")
		}
		if err := other.Process.Signal(syscall.Signal(0)); err != nil {
			t.Errorf("the other process: %v", err)
		}
		f.must(g.Close(f.Context()))
	})
	t.Run("InUse", func(t *testing.T) {
		f := begin(t)
		first, err := f.open(f.request())
		f.must(err)
		theirs := f.child
		f.child = f.sleeper()
		before := f.where(f.child.Process.Pid)
		if _, err := f.open(f.request()); !errdefs.IsAlreadyExists(err) || !errors.Is(err, errInUse) {
			t.Errorf("a second pod of the same cgroup: %v", err)
		}
		if f.where(f.child.Process.Pid) != before {
			t.Error("the second pod's process was moved")
		}
		for _, d := range first.plan.Dirs {
			if !has(d.Path, theirs.Process.Pid) {
				t.Errorf("the first pod's process has left %s", d.Path)
			}
		}
		f.must(first.Close(f.Context()))
	})
	t.Run("Killed", func(t *testing.T) {
		f := begin(t)
		g, err := f.open(f.request())
		f.must(err)
		// As after SIGKILL of the shim: the lock is free, everything else is there.
		f.must(f.led.Release())
		root, key := filepath.Split(f.led.Dir())
		report, err := ledger.Reap(f.Context(), root, key)
		f.must(err)
		if err := f.child.Wait(); err == nil {
			t.Error("the process was not killed")
		}
		for _, d := range g.plan.Dirs {
			if _, err := os.Stat(d.Path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s: %v (%v)", d.Path, err, report)
			}
		}
		f.led, err = ledger.Create(root, key, ledger.Meta{})
		f.must(err)
	})
}
