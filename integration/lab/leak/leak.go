// SPDX-License-Identifier: Apache-2.0

// Package leak compares the state of the whole machine before and after a test
// and names what the test left behind: processes, mounts in every mount
// namespace, network namespaces, links, traffic control, cgroups of every
// hierarchy, loop devices, Unix sockets, and files where programs put run-time
// state.
//
//	leak.Check(t) // first thing in a test: its clean-up runs last
//
// Everything is compared; there is no marker that a leak would have to carry.
// What appeared but is somebody else's is left out by these rules:
//
//   - kernel threads;
//   - a process with a living ancestor (other than process 1 and the test itself)
//     that was there before: the child of another shell or service;
//   - a process that, or whose ancestor, carries the mark of another lab or
//     another leak check in its environment, and what lies in that lab's directory;
//   - a namespace or socket that only such processes hold – but not a mount that
//     appeared in the namespace of a service that was there before, which is how
//     a propagated mount outlives its maker;
//   - an orphan in another systemd service's cgroup, and such a service's cgroup;
//   - the directories of /run in foreignRun.
//
// A process that carries the mark of this check is never left out.
package leak

import (
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"
)

// Class is a kind of thing that can leak.
type Class string

// The classes that are compared.
const (
	Process Class = "process"
	Mount   Class = "mount"
	NetNS   Class = "netns"
	Link    Class = "link"
	TC      Class = "tc"
	Cgroup  Class = "cgroup"
	Loop    Class = "loop device"
	Socket  Class = "unix socket"
	File    Class = "file"
)

// SettleTime is how long Check waits for what ends by itself a moment later: a
// killed process that is not reaped yet, a network namespace that the kernel
// tears down in the background.
const SettleTime = 5 * time.Second

// Leak is one thing that is there and was not before.
type Leak struct {
	Class Class
	// What describes it: a command line with its pid, a mount point, a path.
	What string
}

func (l Leak) String() string { return string(l.Class) + ": " + l.What }

// item is one thing of a snapshot.
type item struct {
	class Class
	what  string
	path  string // where it lies, if it lies somewhere
	// holders are the processes that keep it alive; with none it stays by itself.
	holders []int
}

// State is a snapshot of the machine.
type State struct {
	procs map[int]proc
	items map[string]item // key tells equal things in two snapshots
}

// Scope adds places to what is searched for files.
type Scope struct {
	// Dirs are searched in full, beside /run and /dev/shm.
	Dirs []string
	// Patterns are matched as by filepath.Glob and not entered, beside defaultPatterns.
	Patterns []string
}

// defaultPatterns are names that this repository's programs and the runtimes of
// the lab use for temporary files.
var defaultPatterns = []string{
	"/tmp/kata-lab-*", "/tmp/kata-module-*", "/tmp/kata-shim*", "/tmp/containerd*", "/tmp/ctd-*", "/tmp/qemu*", "/tmp/virtiofsd*", "/tmp/.virtiofsd*", "/tmp/runc*",
	"/var/run/virtiofsd/*", "/var/lib/kata*", "/var/lib/containerd*",
}

// Take makes a snapshot. A thing that vanishes while it is looked at is not in it.
func Take() (State, error) { return Scope{}.Take() }

// Take makes a snapshot with the scope's additional places.
func (sc Scope) Take() (State, error) {
	s := State{items: map[string]item{}}
	var err error
	if s.procs, err = processes(); err != nil {
		return s, err
	}
	for _, collect := range []func() error{s.mounts, s.network, s.cgroups, s.loops, s.sockets, func() error { return s.files(sc) }} {
		if err := collect(); err != nil {
			return s, fmt.Errorf("leak: %w", err)
		}
	}
	return s, nil
}

func (s *State) add(key string, i item) { s.items[string(i.class)+" "+key] = i }

// Diff lists what is in after and not in before, sorted by class.
func Diff(before, after State) []Leak {
	foreign, roots := after.foreign(before)
	bystanders := map[int]bool{}
	for pid, p := range after.procs {
		old, was := before.procs[pid]
		bystanders[pid] = was && old.start == p.start && !after.marked(pid)
	}
	var leaks []Leak
	for pid, p := range after.procs {
		if old, was := before.procs[pid]; (was && old.start == p.start) || p.kernel || foreign[pid] || pid == os.Getpid() {
			continue
		}
		leaks = append(leaks, Leak{Process, fmt.Sprintf("%d (parent %d) %s", pid, p.ppid, p.cmdline)})
	}
	for key, i := range after.items {
		_, was := before.items[key]
		if was || below(i.path, roots) {
			continue
		}
		if propagated := i.class == Mount && anyOf(i.holders, bystanders); propagated || !allOf(i.holders, foreign) {
			leaks = append(leaks, Leak{i.class, i.what})
		}
	}
	sort.Slice(leaks, func(a, b int) bool {
		if leaks[a].Class != leaks[b].Class {
			return leaks[a].Class < leaks[b].Class
		}
		return leaks[a].What < leaks[b].What
	})
	return leaks
}

func allOf(pids []int, in map[int]bool) bool {
	for _, pid := range pids {
		if !in[pid] {
			return false
		}
	}
	return len(pids) > 0
}

func anyOf(pids []int, in map[int]bool) bool {
	for _, pid := range pids {
		if in[pid] {
			return true
		}
	}
	return false
}

func below(path string, roots []string) bool {
	for _, root := range roots {
		if path == root || strings.HasPrefix(path, root+string(filepath.Separator)) {
			return true
		}
	}
	return false
}

// Settle takes snapshots until nothing is left against before, or limit has
// passed; it returns what is left then. The classes have no common event to wait
// for, so it looks every tenth of a second.
func (sc Scope) Settle(before State, limit time.Duration) ([]Leak, error) {
	deadline := time.Now().Add(limit)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		after, err := sc.Take()
		if err != nil {
			return nil, err
		}
		leaks := Diff(before, after)
		if len(leaks) == 0 || time.Now().After(deadline) {
			return leaks, nil
		}
		<-tick.C
	}
}

// Check takes a snapshot now and fails the test at its end when something is
// left against it SettleTime after its other clean-ups have run. Call it before
// anything that registers a clean-up.
func Check(t testing.TB, dirs ...string) {
	t.Helper()
	check(t, SettleTime, Scope{Dirs: dirs})
}

func check(t testing.TB, limit time.Duration, sc Scope) {
	t.Helper()
	before, err := sc.Take()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		leaks, err := sc.Settle(before, limit)
		if err != nil {
			t.Error(err)
			return
		}
		if len(leaks) > 0 {
			t.Errorf("left behind on this machine:\n%s", Format(leaks))
		}
	})
}

// Format writes one line for each leak.
func Format(leaks []Leak) string {
	var b strings.Builder
	for _, l := range leaks {
		fmt.Fprintf(&b, "  %s\n", l)
	}
	return b.String()
}
