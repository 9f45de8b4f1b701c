// SPDX-License-Identifier: Apache-2.0

package leak

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// markEnv is inherited by whatever this process starts from here on; labRootEnv
// is the mark of package lab.
const (
	markEnv    = "KATA_LEAK_MARK"
	labRootEnv = "KATA_LAB_ROOT"
)

var ourMark = fmt.Sprintf("%d", os.Getpid())

func init() {
	// The start time makes the mark unique; without /proc there is nothing to compare anyway.
	if p, err := readProcess(os.Getpid()); err == nil {
		ourMark += "-" + p.start
	}
	os.Setenv(markEnv, ourMark)
}

// proc is what a snapshot knows about a process.
type proc struct {
	ppid    int
	start   string // clock ticks since boot, proc_pid_stat(5) field 22: with the pid it identifies
	kernel  bool
	zombie  bool
	cmdline string
	mark    string // markEnv in its environment
	labRoot string // labRootEnv in its environment
	service string // the systemd service that its cgroup belongs to
	mntNS   string // "mnt:[inode]"
	netNS   string
	// sockets and netNSFDs are inodes and namespaces that its descriptors hold.
	sockets, netNSFDs []string
}

func processes() (map[int]proc, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("leak: processes: %w", err)
	}
	procs := map[int]proc{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		p, err := readProcess(pid)
		if gone(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("leak: process %d: %w", pid, err)
		}
		if p.zombie && p.ppid == 1 {
			continue // it has ended; when process 1 collects it is not the test's affair
		}
		procs[pid] = p
	}
	return procs, nil
}

// gone tells that a thing vanished between being listed and being read.
func gone(err error) bool { return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) }

// pfKthread is PF_KTHREAD of the kernel's include/linux/sched.h.
const pfKthread = 0x00200000

func readProcess(pid int) (proc, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return proc{}, err
	}
	// The name in parentheses may hold anything; fields count from behind its end.
	name, rest, ok := cutLast(string(stat), ") ")
	f := strings.Fields(rest)
	if !ok || len(f) < 20 {
		return proc{}, fmt.Errorf("unexpected %s/stat: %q", dir, stat)
	}
	p := proc{start: f[19], zombie: f[0] == "Z"}
	p.ppid, _ = strconv.Atoi(f[1])
	flags, _ := strconv.ParseUint(f[6], 10, 64)
	if p.kernel = flags&pfKthread != 0; p.kernel {
		return p, nil
	}
	// From here on the process may end at any time; what cannot be read stays empty.
	cmdline, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
	if p.cmdline = strings.TrimSpace(strings.ReplaceAll(string(cmdline), "\x00", " ")); p.cmdline == "" {
		_, comm, _ := strings.Cut(name, "(")
		p.cmdline = "(" + comm + ") state " + f[0]
	}
	environ, _ := os.ReadFile(filepath.Join(dir, "environ"))
	for kv := range strings.SplitSeq(string(environ), "\x00") {
		if v, ok := strings.CutPrefix(kv, markEnv+"="); ok {
			p.mark = v
		} else if v, ok := strings.CutPrefix(kv, labRootEnv+"="); ok {
			p.labRoot = v
		}
	}
	p.service = readService(dir)
	p.mntNS, _ = os.Readlink(filepath.Join(dir, "ns/mnt"))
	p.netNS, _ = os.Readlink(filepath.Join(dir, "ns/net"))
	p.readDescriptors(dir)
	return p, nil
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// readService finds a path element that ends in .service in the process's cgroups.
func readService(dir string) string {
	data, _ := os.ReadFile(filepath.Join(dir, "cgroup"))
	for line := range strings.Lines(string(data)) {
		for element := range strings.SplitSeq(strings.TrimSpace(line), "/") {
			if strings.HasSuffix(element, ".service") {
				return element
			}
		}
	}
	return ""
}

func (p *proc) readDescriptors(dir string) {
	fds, _ := os.ReadDir(filepath.Join(dir, "fd"))
	for _, fd := range fds {
		target, _ := os.Readlink(filepath.Join(dir, "fd", fd.Name()))
		if inode, ok := strings.CutPrefix(target, "socket:["); ok {
			p.sockets = append(p.sockets, strings.TrimSuffix(inode, "]"))
		} else if strings.HasPrefix(target, "net:[") {
			p.netNSFDs = append(p.netNSFDs, target)
		}
	}
}

// foreign finds the processes that are somebody else's (see the package
// comment), and the directories of other labs.
func (s State) foreign(before State) (map[int]bool, []string) {
	foreign := map[int]bool{}
	var roots []string
	for pid, p := range s.procs {
		if p.labRoot != "" && p.mark != ourMark && !s.descends(pid, os.Getpid()) {
			roots = append(roots, p.labRoot)
		}
		if s.isForeign(pid, before) {
			foreign[pid] = true
		}
	}
	return foreign, roots
}

func (s State) isForeign(pid int, before State) bool {
	ours := s.procs[os.Getpid()]
	for q := pid; q > 1; q = s.procs[q].ppid {
		p, alive := s.procs[q]
		switch old, was := before.procs[q]; {
		case q == os.Getpid() || p.mark == ourMark:
			return false
		case !alive:
			return false
		case p.mark != "" || p.labRoot != "":
			return true
		case was && old.start == p.start:
			return true
		case p.ppid == 1 && p.service != "" && p.service != ours.service:
			return true
		}
	}
	return pid == 1
}

// marked tells whether the process or an ancestor carries somebody's mark.
func (s State) marked(pid int) bool {
	for q := pid; q > 1; q = s.procs[q].ppid {
		if p := s.procs[q]; p.mark != "" || p.labRoot != "" {
			return true
		}
	}
	return false
}

// descends tells whether ancestor is among the parents of pid.
func (s State) descends(pid, ancestor int) bool {
	for q := pid; q > 1; q = s.procs[q].ppid {
		if q == ancestor {
			return true
		}
	}
	return false
}
