// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kata-v2/kata/internal/procstat"
)

// podProcesses are the host processes of one container's runtime.
type podProcesses struct {
	shim      int
	vmm       int   // 0 without a virtual machine
	virtiofsd []int // the daemon and its children
}

// findPod finds the processes of the container id among those of the lab: the
// shim by its arguments, the others as its descendants, by their programs.
func findPod(pids []int, id string) (podProcesses, error) {
	var p podProcesses
	for _, pid := range pids {
		args := cmdline(pid)
		if len(args) > 0 && strings.HasPrefix(filepath.Base(args[0]), "containerd-shim") && slices.Contains(args, id) {
			if p.shim != 0 {
				return p, fmt.Errorf("container %s has two shims, %d and %d", id, p.shim, pid)
			}
			p.shim = pid
		}
	}
	if p.shim == 0 {
		return p, fmt.Errorf("no shim of container %s among the processes %v", id, pids)
	}
	all, err := descendants(p.shim)
	if err != nil {
		return p, err
	}
	for _, pid := range all {
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		if err != nil {
			continue // a helper that has just ended is no part of an idle pod
		}
		switch name := filepath.Base(exe); {
		case strings.HasPrefix(name, "qemu-system"):
			p.vmm = pid
		case strings.HasPrefix(name, "virtiofsd"):
			p.virtiofsd = append(p.virtiofsd, pid)
		}
	}
	return p, nil
}

func cmdline(pid int) []string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || len(b) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
}

// descendants are the children of pid, theirs, and so on.
func descendants(pid int) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	children := map[int][]int{}
	for _, e := range entries {
		child, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if err != nil {
			continue // ended meanwhile
		}
		// proc_pid_stat(5): the parent is the second field after the name in
		// parentheses, which may hold anything.
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		if len(f) < 2 {
			continue
		}
		if parent, err := strconv.Atoi(f[1]); err == nil {
			children[parent] = append(children[parent], child)
		}
	}
	var all []int
	for queue := children[pid]; len(queue) > 0; queue = queue[1:] {
		all = append(all, queue[0])
		queue = append(queue, children[queue[0]]...)
	}
	return all, nil
}

// pss is the memory of the processes together, in MiB.
func pss(pids ...int) (float64, error) {
	n, err := procstat.PSS(pids...)
	return float64(n) / (1 << 20), err
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
