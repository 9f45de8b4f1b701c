// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestCgroupfs(t *testing.T) {
	for name, h := range hosts(t) {
		t.Run(name, func(t *testing.T) {
			conformance(t, func(t *testing.T) *fixture { return newFixture(t, h) })
		})
	}
}

// Parents that were there stay; those that pods made go with the last of them.
func TestParents(t *testing.T) {
	for name, h := range hosts(t) {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, h)
			a, err := f.open(Request{Pod: "a", Path: f.parent + "/made/x"})
			f.must(err)
			f.child = f.sleeper()
			b, err := f.open(Request{Pod: "b", Path: f.parent + "/made/y"})
			f.must(err)
			dir := filepath.Dir(b.plan.Dirs[0].Path)
			f.must(a.Close(f.Context()))
			if _, err := os.Stat(dir); err != nil {
				t.Errorf("the second pod's parent: %v", err)
			}
			f.must(b.Close(f.Context()))
			if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the parent that pods made: %v", err)
			}

			theirs := filepath.Dir(dir)
			f.must(os.Mkdir(theirs, 0o755))
			defer os.Remove(theirs)
			c, err := f.open(Request{Pod: "c", Path: f.parent + "/c"})
			f.must(err)
			f.must(c.Close(f.Context()))
			if _, err := os.Stat(theirs); err != nil {
				t.Errorf("the engine's parent: %v", err)
			}
		})
	}
}

// The shim's former cgroup may be gone by the time it leaves.
func TestHomeIsGone(t *testing.T) {
	h, ok := hosts(t)["v1"]
	if !ok {
		h = hosts(t)["v2"]
	}
	f := newFixture(t, h)
	m := h.all()[0]
	home := filepath.Join(m.Mount, f.parent+"-home")
	f.must(os.Mkdir(home, 0o755))
	d := Dir{Mount: m.Mount, Path: home, Controllers: m.Controllers}
	if !d.V2 && d.has("cpuset") {
		f.must(d.inheritCPUs())
	}
	f.must(writeFile(strconv.Itoa(f.child.Process.Pid), home, "cgroup.procs"))
	g, err := f.open(f.request())
	f.must(err)
	f.must(os.Remove(home))
	f.must(g.Close(f.Context()))
	if !has(m.Mount, f.child.Process.Pid) {
		t.Errorf("the process is in %s", f.where(f.child.Process.Pid))
	}
}

func limited(memory, quota int64, cpus string) *specs.LinuxResources {
	period := uint64(50_000)
	return &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &memory}, CPU: &specs.LinuxCPU{Quota: &quota, Period: &period, Cpus: cpus}}
}

// What the files hold in the end, for each controller that is there.
func TestLimits(t *testing.T) {
	want := map[bool]map[string][2]string{
		false: {"memory": {"memory.limit_in_bytes", "100663296"}, "cpu": {"cpu.cfs_quota_us", "125000"}, "cpuset": {"cpuset.cpus", "0"}},
		true:  {"memory": {"memory.max", "100663296"}, "cpu": {"cpu.max", "125000 100000"}, "cpuset": {"cpuset.cpus", "0"}},
	}
	for name, h := range hosts(t) {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, h)
			r := f.request()
			r.Resources, r.Overhead = limited(64<<20, 50_000, "0"), limited(32<<20, 12_500, "")
			g, err := f.open(r)
			f.must(err)
			missing := strings.Contains(f.log.String(), "controllers are missing")
			for _, d := range g.plan.Dirs {
				for c, w := range want[d.V2] {
					if !d.has(c) {
						continue
					}
					got, err := readFile(d.Path, w[0])
					if got != w[1] && (!d.V2 || !missing || !errors.Is(err, fs.ErrNotExist)) {
						t.Errorf("%s/%s is %q, %v; want %s", d.Path, w[0], got, err, w[1])
					}
				}
			}
			f.must(g.Close(f.Context()))

			r.Resources.CPU.Cpus = "4000"
			g, err = f.open(r)
			switch {
			case missing: // nobody can notice without the controller
				f.must(err)
				f.must(g.Close(f.Context()))
			case err == nil || !strings.Contains(err.Error(), "linux.resources.cpu.cpus"):
				t.Errorf("a CPU that is not there: %v", err)
			}
		})
	}
}

// Limits of a running pod change, upwards before its machine grows and downwards after.
func TestUpdate(t *testing.T) {
	for name, h := range hosts(t) {
		t.Run(name, func(t *testing.T) { testUpdate(t, newFixture(t, h)) })
	}
}

func testUpdate(t *testing.T, f *fixture) {
	r := f.request()
	overhead := limited(32<<20, 12_500, "")
	r.Resources, r.Overhead = limited(64<<20, 50_000, "0"), overhead
	g, err := f.open(r)
	f.must(err)
	missing := strings.Contains(f.log.String(), "controllers are missing")
	const none = -1
	expect := func(when string, memory, quota int64, cpus string) {
		t.Helper()
		for _, d := range g.plan.Dirs {
			want := map[string]string{"memory.limit_in_bytes": strconv.FormatInt(memory, 10), "cpu.cfs_quota_us": strconv.FormatInt(quota, 10), "cpuset.cpus": cpus}
			if d.V2 {
				want = map[string]string{"memory.max": strconv.FormatInt(memory, 10), "cpu.max": strconv.FormatInt(quota, 10) + " 100000", "cpuset.cpus": cpus}
				if memory == none {
					want["memory.max"] = "max"
				}
				if quota == none {
					want["cpu.max"] = "max 100000"
				}
			}
			for file, w := range want {
				got, err := readFile(d.Path, file)
				if !d.has(strings.SplitN(file, ".", 2)[0]) || d.V2 && missing && errors.Is(err, fs.ErrNotExist) {
					continue
				}
				if got != w && !(memory == none && file == "memory.limit_in_bytes" && isHuge(got)) {
					t.Errorf("%s: %s/%s is %q, %v; want %s", when, d.Path, file, got, err, w)
				}
			}
		}
	}
	expect("opened", 96<<20, 125_000, "0")
	f.must(g.Update(f.Context(), limited(128<<20, 25_000, "1"), overhead, true))
	expect("grown", 160<<20, 125_000, "0-1")
	f.must(g.Update(f.Context(), limited(128<<20, 25_000, "1"), overhead, false))
	expect("shrunk", 160<<20, 75_000, "1")
	all, err := readFile(filepath.Dir(g.plan.Dirs[0].Path), "cpuset.cpus")
	for _, d := range g.plan.Dirs {
		if d.has("cpuset") && !d.V2 {
			all, err = readFile(filepath.Dir(d.Path), "cpuset.cpus")
		}
	}
	f.must(g.Update(f.Context(), nil, nil, false))
	if err == nil {
		expect("without limits", none, none, all)
	}
	f.must(g.Close(f.Context()))
}

// A limit below what is used is refused before version 2 kills for it.
func TestUpdateBelowUse(t *testing.T) {
	h, _ := memoryHost(t)
	f := newFixture(t, h)
	cmd := exec.Command("sh", "-c", `read x; v=$(head -c 8000000 /dev/zero | tr '\000' a); echo up; read y`)
	stdin, err := cmd.StdinPipe()
	f.must(err)
	stdout, err := cmd.StdoutPipe()
	f.must(err)
	f.child = f.start(cmd)
	r := f.request()
	r.Resources, r.Overhead = limited(256<<20, 0, ""), limited(16<<20, 0, "")
	g, err := f.open(r)
	f.must(err)
	_, err = io.WriteString(stdin, "go\n")
	f.must(err)
	_, err = io.ReadFull(stdout, make([]byte, 3))
	f.must(err)
	err = g.Update(f.Context(), limited(2<<20, 0, ""), limited(1<<20, 0, ""), false)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "linux.resources.memory.limit") {
		t.Errorf("a limit below what is used: %v", err)
	}
	f.must(g.Update(f.Context(), limited(128<<20, 0, ""), r.Overhead, false))
	f.must(g.Close(f.Context()))
}

// Split: the process is in the overhead's cgroup, one of its threads in the pod's.
func TestSplit(t *testing.T) {
	h, ok := hosts(t)["v1"]
	if !ok {
		t.Log("only version 1 can split a process; TestSplitIsRefused has the rest")
		return
	}
	f := newFixture(t, h)
	r := f.request()
	r.Pod, r.Split = filepath.Base(f.parent), true
	g, err := f.open(r)
	f.must(err)
	pid := f.child.Process.Pid
	for _, d := range g.plan.Overhead {
		if !has(d.Path, pid) {
			t.Errorf("the process is not in %s", d.Path)
		}
	}
	f.must(g.AddThreads([]int{pid})) // the only thread that it has
	for _, d := range g.plan.Dirs {
		if tasks, err := readFile(d.Path, "tasks"); tasks != strconv.Itoa(pid) {
			t.Errorf("%s/tasks: %q, %v", d.Path, tasks, err)
		}
	}
	f.must(g.Close(f.Context()))
	if _, err := os.Stat(filepath.Join(h.V1[0].Mount, OverheadParent)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the overhead's parent: %v", err)
	}
}

// memoryHost is the version that can limit memory here.
func memoryHost(t *testing.T) (Host, Hierarchy) {
	t.Helper()
	h, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	if h.V2 != nil {
		return h, *h.V2
	}
	m, ok := h.with("memory")
	if !ok {
		t.Fatal("this machine has no memory controller: the tests need it")
	}
	return h, m
}

// A limit that the directory above has is left to whoever set it.
func TestLimitAbove(t *testing.T) {
	h, m := memoryHost(t)
	f := newFixture(t, h)
	pod := filepath.Join(m.Mount, f.parent)
	f.must(os.Mkdir(pod, 0o755))
	defer os.Remove(pod)
	file, unlimited := "memory.limit_in_bytes", isHuge
	if h.V2 != nil {
		file, unlimited = "memory.max", isMax
		Dir{Mount: m.Mount, Path: pod, V2: true}.enable()
	}
	f.must(writeFile("134217728", pod, file))
	r := f.request()
	r.Resources, r.Overhead = limited(64<<20, 50_000, ""), limited(32<<20, 12_500, "")
	g, err := f.open(r)
	f.must(err)
	if got, err := readFile(pod, "kata_p1", file); err != nil || !unlimited(got) {
		t.Errorf("the pod's own limit is %q, %v; want none", got, err)
	}
	f.must(g.Close(f.Context()))
}

// A process that the host's kernel kills for want of memory does not go unnoticed.
func TestOOM(t *testing.T) {
	h, _ := memoryHost(t)
	f := newFixture(t, h)
	cmd := exec.Command("sh", "-c", "read x; exec dd if=/dev/zero of=/dev/null bs=512M count=1")
	stdin, err := cmd.StdinPipe()
	f.must(err)
	f.child = f.start(cmd)
	r := f.request()
	r.Resources, r.Overhead = limited(16<<20, 0, ""), limited(16<<20, 0, "")
	g, err := f.open(r)
	f.must(err)
	if err := g.OOM(); err != nil {
		t.Errorf("before: %v", err)
	}
	f.must(stdin.Close())
	if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("a process past the limit ended with %v", err)
	}
	err = g.OOM()
	if err == nil || !strings.Contains(err.Error(), "killed 1 of the pod's processes") || !strings.Contains(err.Error(), "limit 33554432 bytes of "+g.plan.Path) {
		t.Errorf("OOM: %v", err)
	}
	f.must(g.Close(f.Context()))
}
