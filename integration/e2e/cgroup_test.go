// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/sandbox/cgroup"
)

// hostGroups are the directories of a pod's cgroup, in every hierarchy.
func hostGroups(t *testing.T, r cgroup.Request) []cgroup.Dir {
	t.Helper()
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	p, err := h.Plan(r)
	if err != nil || len(p.Dirs) == 0 {
		t.Fatalf("%v: %+v; the tests need cgroups", err, p)
	}
	return p.Dirs
}

// inGroup are the processes of a cgroup.
func inGroup(t *testing.T, dir string) map[int]bool {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		t.Error(err)
	}
	out := map[int]bool{}
	for f := range strings.FieldsSeq(string(data)) {
		pid, _ := strconv.Atoi(f)
		out[pid] = true
	}
	return out
}

// engineGroup makes a pod's cgroup with a limit of memory in the place of kubelet.
// It says which file holds the use of it.
func engineGroup(b *box, name string, limit int64) (usage string) {
	b.Helper()
	for _, d := range hostGroups(b.T, cgroup.Request{Pod: "x", Path: name + "/x"}) {
		pod := filepath.Dir(d.Path)
		if err := os.Mkdir(pod, 0o755); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			if err := unix.Rmdir(pod); err != nil {
				b.Errorf("the engine's own cgroup: rmdir %s: %v", pod, err)
			}
		})
		for file, use := range map[string]string{"memory.limit_in_bytes": "memory.usage_in_bytes", "memory.max": "memory.current"} {
			if _, err := os.Stat(filepath.Join(pod, file)); err != nil {
				continue
			}
			if err := os.WriteFile(filepath.Join(pod, file), []byte(strconv.FormatInt(limit, 10)), 0); err != nil {
				b.Fatal(err)
			}
			usage = filepath.Join(pod, use)
		}
	}
	if usage == "" {
		b.Fatal("no memory controller: the tests need it")
	}
	return usage
}

func readInt(t *testing.T, path string) int64 {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return n
}

// TestHostCgroup: everything of a pod is in the cgroup that its engine chose, whose
// limits and counters so hold for the machine, and which stays when the pod goes.
func TestHostCgroup(t *testing.T) {
	b := newBox(t)
	parent := fmt.Sprintf("/kata-e2e-%d", os.Getpid())
	usage := engineGroup(b, parent, 1<<30)
	s := newSpec(t, "sleep", "100000")
	s.Linux.CgroupsPath = parent + "/grouped"
	b.startSpec("grouped", s)
	f := b.family("grouped")
	for _, d := range hostGroups(t, cgroup.Request{Pod: "grouped", Path: s.Linux.CgroupsPath}) {
		in := inGroup(t, d.Path)
		for what, pid := range map[string]int{"shim": f.shim, "QEMU": f.vmm, "virtiofsd": f.daemon, "virtiofsd's worker": f.worker} {
			if !in[pid] {
				t.Errorf("%s (%d) is not in %s: %v", what, pid, d.Path, in)
			}
		}
	}
	if used := readInt(t, usage); used < 64<<20 {
		t.Errorf("the pod's cgroup counts %d bytes; want the machine's memory in it", used)
	}
	// Whatever is killed, the reaper finds the cgroup in the ledger.
	t.Run("ShimKilled", func(t *testing.T) {
		if err := unix.Kill(f.shim, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		b.remove("grouped")
	})

	s.Linux.CgroupsPath = "no.slice:at:all:here"
	if r := b.runSpec("badgroup", s); r.Code == 0 || !strings.Contains(r.Stderr, "linux.cgroupsPath") {
		t.Errorf("a path with three colons: status %d: %s", r.Code, r.Stderr)
	}
}

// TestHostOutOfMemory: a machine that the host's kernel kills says so, at its
// start and later.
func TestHostOutOfMemory(t *testing.T) {
	b := newBox(t)
	parent := fmt.Sprintf("/kata-e2e-%d", os.Getpid())
	usage := engineGroup(b, parent, 96<<20)
	s := newSpec(t, "true")
	s.Linux.CgroupsPath = parent + "/hungry"
	want := "killed 1 of the pod's processes for want of memory (limit %d bytes of " + parent + ")"
	if r := b.runSpec("hungry", s); r.Code == 0 || !strings.Contains(r.Stderr, fmt.Sprintf(want, 96<<20)) {
		t.Errorf("a machine that does not fit: status %d, stderr %q", r.Code, r.Stderr)
	}

	limit := strings.NewReplacer("usage_in_bytes", "limit_in_bytes", "current", "max").Replace(usage)
	set := func(n int64) {
		t.Helper()
		if err := os.WriteFile(limit, []byte(strconv.FormatInt(n, 10)), 0); err != nil {
			t.Fatal(err)
		}
	}
	set(1 << 30)
	s = newSpec(t, "sleep", "100000")
	s.Linux.CgroupsPath = parent + "/greedy"
	b.startSpec("greedy", s)
	tight := readInt(t, usage) + 32<<20
	tight -= tight % (1 << 20)
	set(tight)
	b.exec("greedy", "dd", "if=/dev/zero", "of=/dev/null", "bs=150M", "count=1")
	if logged := strings.Join(b.c.Log(), "\n"); !strings.Contains(logged, fmt.Sprintf(want, tight)) {
		t.Error("the machine's end does not name the host's want of memory")
	}
}

// TestHostCgroupSplit: with sandbox_cgroup_only = false only the vCPUs' threads are
// in the pod's cgroup.
func TestHostCgroupSplit(t *testing.T) {
	if h, err := cgroup.Detect(); err != nil || h.V2 != nil {
		t.Logf("version 1 alone can do that; sandbox/cgroup tests the refusal (%v)", err)
		return
	}
	o := labOptions(t)
	o.Kata.Set = map[string]string{"runtime.sandbox_cgroup_only": "false"}
	b := newOwnBox(t, o)
	s := newSpec(t, "sleep", "100000")
	s.Linux.CgroupsPath = fmt.Sprintf("/kata-e2e-%d/split", os.Getpid())
	b.startSpec("split", s)
	f := b.family("split")
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	p, err := h.Plan(cgroup.Request{Pod: "split", Path: s.Linux.CgroupsPath, Split: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range p.Overhead {
		in := inGroup(t, d.Path)
		for what, pid := range map[string]int{"shim": f.shim, "QEMU": f.vmm, "virtiofsd": f.daemon} {
			if !in[pid] {
				t.Errorf("%s (%d) is not in %s: %v", what, pid, d.Path, in)
			}
		}
	}
	for _, d := range p.Dirs {
		data, err := os.ReadFile(filepath.Join(d.Path, "tasks"))
		tids := strings.Fields(string(data))
		if vcpus := len(vcpuAffinity(b, "split")); err != nil || len(tids) != vcpus {
			t.Errorf("%s: threads %v, %v; want those of the %d vCPUs", d.Path, tids, err, vcpus)
		}
		for _, tid := range tids {
			if _, err := os.Stat(fmt.Sprintf("/proc/%d/task/%s", f.vmm, tid)); err != nil {
				t.Errorf("%s: thread %s is not QEMU's: %v", d.Path, tid, err)
			}
		}
	}
}
