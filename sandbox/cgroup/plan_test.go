// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func parsed(t *testing.T, name string) Host {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name+".mountinfo"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h, err := parseMountinfo(f)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

var update = flag.Bool("update", false, "rewrite the golden file")

// planned is a plan as the golden file shows it.
type planned struct {
	Case                     string
	Error, Slice, Unit       string   `json:",omitempty"`
	Dirs, Overhead, Tracking []string `json:",omitempty"`
	Writes                   []string `json:",omitempty"`
}

func show(name string, p Plan, err error) planned {
	if err != nil {
		return planned{Case: name, Error: err.Error()}
	}
	paths := func(dirs []Dir) (out []string) {
		for _, d := range dirs {
			out = append(out, d.Path)
		}
		return out
	}
	out := planned{Case: name, Slice: p.Slice, Unit: p.Unit, Dirs: paths(p.Dirs), Overhead: paths(p.Overhead), Tracking: paths(p.Tracking)}
	for _, s := range p.Limits.settings(p.Dirs[0].V2) {
		out.Writes = append(out.Writes, s.file+"="+s.value)
	}
	return out
}

// TestPlan compares what is planned for every form and version with a file.
func TestPlan(t *testing.T) {
	pod := "/kubepods/burstable/pod1b2c/abc"
	scope := "kubepods-burstable-pod1b2c.slice:cri-containerd:abc"
	some, over := limited(128<<20, 25_000, "1,3"), limited(64<<20, 5_000, "")
	var got bytes.Buffer
	enc := json.NewEncoder(&got)
	enc.SetIndent("", " ")
	for _, host := range []string{"v1", "v2"} {
		h := parsed(t, host)
		for _, c := range []struct {
			name string
			r    Request
		}{
			{"cgroupfs", Request{Path: pod}},
			{"cgroupfs, limits and overhead", Request{Path: pod, Resources: some, Overhead: over}},
			{"systemd", Request{Path: scope}},
			{"systemd, limits and overhead", Request{Path: scope, Resources: some, Overhead: over}},
			{"nothing asked for", Request{}},
			{"parent", Request{Parent: "/kubepods/besteffort/podx"}},
			{"parent slice", Request{Parent: "/kubepods.slice/kubepods-podx.slice"}},
			{"split", Request{Path: pod, Resources: some, Overhead: over, Split: true}},
			{"split, systemd", Request{Path: scope, Split: true}},
		} {
			c.r.Pod = "abc"
			p, err := h.Plan(c.r)
			if err := enc.Encode(show(host+": "+c.name, p, err)); err != nil {
				t.Fatal(err)
			}
		}
	}
	golden := filepath.Join("testdata", "plans.json")
	if *update {
		if err := os.WriteFile(golden, got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want, got.Bytes()) {
		t.Fatalf("%s differs from what is planned (-update rewrites it):\n%s", golden, got.Bytes())
	}
}

func TestParseMountinfo(t *testing.T) {
	t.Parallel()
	v1 := parsed(t, "v1")
	var mounts []string
	for _, m := range v1.all() {
		mounts = append(mounts, filepath.Base(m.Mount))
	}
	if want := []string{"cpu,cpuacct", "memory", "cpuset", "pids", "systemd", "unified"}; v1.V2 != nil || !slices.Equal(mounts, want) {
		t.Errorf("version 1: %v, want %v", mounts, want)
	}
	if v2 := parsed(t, "v2"); v2.V2 == nil || v2.V2.Mount != "/sys/fs/cgroup" || len(v2.all()) != 1 {
		t.Errorf("version 2: %+v", v2)
	}
	none, err := parseMountinfo(strings.NewReader("22 28 0:20 / /proc rw - proc proc rw\n"))
	if err != nil || len(none.all()) != 0 {
		t.Errorf("no cgroups: %+v, %v", none, err)
	}
	if p, err := none.Plan(Request{Pod: "p"}); err != nil || len(p.Dirs) != 0 {
		t.Errorf("a plan without cgroups: %+v, %v", p, err)
	}
}

func TestLimitsOf(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	for _, c := range []struct {
		name string
		r    Request
		want Limits
	}{
		{"nothing", Request{}, Limits{}},
		{"overhead alone", Request{Overhead: limited(32*mib, 1000, "")}, Limits{}},
		{"a container's limits without an overhead", Request{Resources: limited(64*mib, 50_000, "0-1")}, Limits{CPUs: "0-1"}},
		{"both", Request{Resources: limited(64*mib, 50_000, ""), Overhead: limited(32*mib, 12_500, "")}, Limits{MemoryBytes: 96 * mib, CPUQuota: 125_000}},
		{"overhead of memory alone", Request{Resources: limited(64*mib, 50_000, ""), Overhead: limited(32*mib, 0, "")}, Limits{MemoryBytes: 96 * mib, CPUQuota: 100_000}},
		{"overhead of CPU alone", Request{Resources: limited(64*mib, 50_000, ""), Overhead: limited(0, 50_000, "")}, Limits{CPUQuota: 200_000}},
		{"no limits, overhead", Request{Resources: limited(0, -1, ""), Overhead: limited(32*mib, 1000, "")}, Limits{}},
		{"unlimited memory", Request{Resources: limited(-1, 0, ""), Overhead: limited(32*mib, 0, "")}, Limits{}},
		{"split", Request{Resources: limited(64*mib, 50_000, ""), Overhead: limited(32*mib, 12_500, ""), Split: true}, Limits{CPUQuota: 100_000}},
		{"empty structures", Request{Resources: &specs.LinuxResources{}, Overhead: &specs.LinuxResources{}}, Limits{}},
	} {
		if got := limits(c.r); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}

// Kubelet's directory of a pod has the pod's limits, or none because the pod has none.
func TestNoLimitsBelowKubelet(t *testing.T) {
	t.Parallel()
	stated := Limits{MemoryBytes: 1 << 26, CPUQuota: 50_000, CPUs: "0-1"}
	for dir, kubelets := range map[string]bool{
		"/sys/fs/cgroup/memory/kubepods/pod12-34":                                                  true,
		"/sys/fs/cgroup/memory/kubepods/burstable/pod12-34":                                        true,
		"/sys/fs/cgroup/memory/top/kubepods/besteffort/pod12-34":                                   true,
		"/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod12_34.slice": true,
		"/sys/fs/cgroup/kubepods.slice/kubepods-pod12_34.slice":                                    true,
		"/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice":                                   false,
		"/sys/fs/cgroup/memory/kubepods/burstable":                                                 false,
		"/sys/fs/cgroup/memory/podlike":                                                            false,
		"/sys/fs/cgroup/memory/system.slice":                                                       false,
	} {
		want := stated
		if kubelets {
			want = Limits{CPUs: stated.CPUs}
		}
		// None of these directories exists: what they are called is all there is to go by.
		if got := stated.notAbove(Dir{Path: filepath.Join(dir, "kata_p1")}); got != want {
			t.Errorf("below %s: %+v, want %+v", dir, got, want)
		}
	}
}

// On version 2 controllers are handed down from the root, and those that do not arrive are named.
func TestEnable(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	d := Dir{Mount: root, Path: filepath.Join(root, "a/b/c"), V2: true}
	if err := os.MkdirAll(d.Path, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"", "a", "a/b", "a/b/c"} {
		for _, f := range []string{"cgroup.subtree_control", "cgroup.controllers"} {
			if err := os.WriteFile(filepath.Join(root, p, f), []byte("cpu memory\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	if missing := d.enable(); !slices.Equal(missing, []string{"cpuset", "io", "pids"}) {
		t.Errorf("missing %v", missing)
	}
	for p, want := range map[string]bool{"": true, "a": true, "a/b": true, "a/b/c": false} {
		if got, _ := readFile(root, p, "cgroup.subtree_control"); strings.HasPrefix(got, "+") != want {
			t.Errorf("/%s: %q; written to: want %v", p, got, want)
		}
	}
}

func TestSplitIsRefused(t *testing.T) {
	t.Parallel()
	for host, path := range map[string]string{"v2": "/a/b", "v1": "a.slice:b:c"} {
		_, err := parsed(t, host).Plan(Request{Pod: "p", Path: path, Split: true})
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "runtime.sandbox_cgroup_only") {
			t.Errorf("%s: %v", host, err)
		}
	}
}
