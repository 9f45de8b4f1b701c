// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// proc is one process of a tree, as /proc has it (proc_pid_stat(5)).
type proc struct {
	pid, parent int
	name        string
	state       byte
}

// describe says what the process is doing: its name, state, and where in the
// kernel it waits, which tells a stuck file system from a slow machine.
func (p proc) describe(root string) string {
	wait, err := os.ReadFile(filepath.Join(root, strconv.Itoa(p.pid), "wchan"))
	where := strings.Trim(string(wait), "\x00\n")
	if err != nil || where == "" || where == "0" {
		return fmt.Sprintf("%s %c", p.name, p.state)
	}
	return fmt.Sprintf("%s %c in %s", p.name, p.state, where)
}

// readProc reads one process of the proc file system at root.
func readProc(root string, pid int) (proc, bool) {
	b, err := os.ReadFile(filepath.Join(root, strconv.Itoa(pid), "stat"))
	if err != nil {
		return proc{}, false
	}
	// "pid (name) state ppid …": the name may hold anything, parentheses too.
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 0 || end < open {
		return proc{}, false
	}
	rest := strings.Fields(string(b[end+1:]))
	if len(rest) < 2 || len(rest[0]) != 1 {
		return proc{}, false
	}
	parent, err := strconv.Atoi(rest[1])
	return proc{pid: pid, parent: parent, name: strings.ToValidUTF8(string(b[open+1:end]), "?"), state: rest[0][0]}, err == nil
}

// tree lists pid and its descendants, parents first.
func tree(root string, pid int) []proc {
	first, ok := readProc(root, pid)
	if !ok {
		return nil
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return []proc{first}
	}
	var all []proc
	for _, e := range entries {
		if n, err := strconv.Atoi(e.Name()); err == nil {
			if p, ok := readProc(root, n); ok {
				all = append(all, p)
			}
		}
	}
	out := []proc{first}
	for i := 0; i < len(out); i++ {
		for _, p := range all {
			if p.parent == out[i].pid && !slices.Contains(out, p) {
				out = append(out, p)
			}
		}
	}
	return out
}

// endTree kills a process that the caller has not collected yet, and everything
// that it started, and says what they were doing. What an engine has forked would
// otherwise go on without it, up to the program that nobody waits for any more.
// Stopped, none of them forks; a child's number is not used anew before its
// parent, which is stopped, has collected it.
func endTree(pid, pidfd int) string {
	const root = "/proc"
	var doing []string
	for _, p := range tree(root, pid) {
		doing = append(doing, p.describe(root))
	}
	_ = unix.PidfdSendSignal(pidfd, unix.SIGSTOP, nil, 0)
	stopped := map[int]bool{pid: true}
	for again := true; again; {
		again = false
		for _, p := range tree(root, pid) {
			if !stopped[p.pid] { // and it may have forked since the list was made
				_ = unix.Kill(p.pid, unix.SIGSTOP)
				stopped[p.pid], again = true, true
			}
		}
	}
	delete(stopped, pid)
	for child := range stopped {
		_ = unix.Kill(child, unix.SIGKILL)
	}
	_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
	return strings.Join(doing, ", ")
}
