// SPDX-License-Identifier: Apache-2.0

package hypervisortest

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// state is what a process holds: open descriptors and children.
type state struct {
	fds      map[string]int // what they point to → how many
	children []string
}

func snapshot(t *testing.T) state {
	t.Helper()
	return state{descriptors(t), children(t)}
}

func descriptors(t *testing.T) map[string]int {
	t.Helper()
	const dir = "/proc/self/fd"
	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]int{}
	for _, n := range names {
		target, err := os.Readlink(filepath.Join(dir, n.Name()))
		if err != nil || strings.HasPrefix(target, "/proc/") || strings.Contains(target, "[event") {
			continue // the listing itself; the runtime's poller, made when first needed
		}
		kind, _, _ := strings.Cut(target, ":[") // a socket's number differs each time
		out[kind]++
	}
	return out
}

func children(t *testing.T) (out []string) {
	t.Helper()
	lists, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lists {
		data, err := os.ReadFile(l)
		if err == nil { // a thread may end meanwhile
			out = append(out, strings.Fields(string(data))...)
		}
	}
	slices.Sort(out)
	return out
}

// nothingLeft checks that the machines of a subtest are gone with everything
// that they held: processes, descriptors, goroutines.
func (s *suite) nothingLeft(before state) {
	s.Helper()
	s.mu.Lock()
	pids := s.pids
	s.mu.Unlock()
	for _, pid := range pids {
		if err := syscall.Kill(pid, 0); err == nil {
			s.Errorf("process %d is left", pid)
		}
	}
	after := snapshot(s.T)
	if !maps.Equal(before.fds, after.fds) {
		s.Errorf("open descriptors: %v before, %v now", before.fds, after.fds)
	}
	if !slices.Equal(before.children, after.children) {
		s.Errorf("child processes: %v before, %v now", before.children, after.children)
	}
	// Nothing tells when a goroutine has ended that has just told its last, so
	// this one is looked at until it is true.
	var left []string
	for limit := time.Now().Add(5 * time.Second); ; runtime.Gosched() {
		if left = goroutines(); len(left) == 0 {
			return
		}
		if time.Now().After(limit) {
			break
		}
	}
	s.Errorf("goroutines are left:\n%s", strings.Join(left, "\n\n"))
}

// goroutines returns those of the module that no test function runs.
func goroutines() (out []string) {
	buf := make([]byte, 1<<20)
	buf = buf[:runtime.Stack(buf, true)]
	for _, g := range strings.Split(string(buf), "\n\n") {
		if strings.Contains(g, "kata-v2/kata/") && !strings.Contains(g, "testing.tRunner(") {
			out = append(out, g)
		}
	}
	return out
}

// String is for messages.
func (s state) String() string { return fmt.Sprintf("descriptors %v, children %v", s.fds, s.children) }
