// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/internal/config"
)

var testHost = Host{CPUs: 4, MemoryBytes: 2 << 30}

// limited are limits; zero values are none.
func limited(memory, quota int64, cpus string) *specs.LinuxResources {
	r := &specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: cpus}, Memory: &specs.LinuxMemory{}}
	if memory != 0 {
		r.Memory.Limit = &memory
	}
	if quota != 0 {
		r.CPU.Quota = &quota
	}
	return r
}

func TestDemand(t *testing.T) {
	for _, c := range []struct {
		r    *specs.LinuxResources
		want demand
		bad  string // the field that the error names
	}{
		{nil, demand{}, ""},
		{&specs.LinuxResources{}, demand{}, ""},
		{limited(64*mib, 150_000, "2,0-1"), demand{1500, 64 * mib, []int{0, 1, 2}}, ""},
		{limited(-1, -1, ""), demand{}, ""},
		{limited(0, 1, ""), demand{milliCPUs: 1}, ""},
		{limited(2<<30, 0, ""), demand{memory: 2 << 30}, ""},
		{limited(2<<30+1, 0, ""), demand{}, "memory.limit"},
		{limited(-2, 0, ""), demand{}, "memory.limit"},
		{limited(0, -100, ""), demand{}, "cpu.quota"},
		{limited(0, 0, "0-4"), demand{}, "cpu.cpus"},
		{limited(0, 0, "a"), demand{}, "cpu.cpus"},
		{limited(0, 0, "3-1"), demand{}, "cpu.cpus"},
		{limited(0, 0, "-1"), demand{}, "cpu.cpus"},
	} {
		got, err := demandOf(c.r, testHost)
		if c.bad != "" {
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "linux.resources."+c.bad) {
				t.Errorf("%+v: %v; want it to name %s", c.r, err, c.bad)
			}
			continue
		}
		if err != nil || fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("%+v: %+v, %v; want %+v", c.r, got, err, c.want)
		}
	}
}

func TestStated(t *testing.T) {
	for _, c := range []struct {
		p    PodConfig
		want demand
		bad  string
	}{
		{PodConfig{}, demand{}, ""},
		{PodConfig{Resources: limited(64*mib, 50_000, "")}, demand{milliCPUs: 500, memory: 64 * mib}, ""},
		{PodConfig{Annotations: map[string]string{annotationPodQuota: "30000", annotationPodPeriod: "20000", annotationPodMemory: "1048576"}}, demand{milliCPUs: 1500, memory: mib}, ""},
		{PodConfig{Annotations: map[string]string{annotationPodQuota: "-1", annotationPodMemory: "0"}}, demand{}, ""},
		{PodConfig{Annotations: map[string]string{annotationPodMemory: "1Gi"}}, demand{}, annotationPodMemory},
		{PodConfig{Annotations: map[string]string{annotationPodMemory: "-7"}}, demand{}, annotationPodMemory},
		{PodConfig{Annotations: map[string]string{annotationPodMemory: "4294967296"}}, demand{}, annotationPodMemory},
		{PodConfig{Annotations: map[string]string{annotationPodQuota: "-2"}}, demand{}, annotationPodQuota},
		{PodConfig{Annotations: map[string]string{annotationPodPeriod: "x"}}, demand{}, annotationPodPeriod},
	} {
		got, err := c.p.stated(testHost)
		if c.bad != "" {
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.bad) {
				t.Errorf("%+v: %v; want it to name %s", c.p, err, c.bad)
			}
			continue
		}
		if err != nil || fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("%+v: %+v, %v; want %+v", c.p, got, err, c.want)
		}
	}
}

func TestBounds(t *testing.T) {
	for _, c := range []struct {
		config string
		d      demand
		want   size
	}{
		{"", demand{}, size{1, 256 * mib}},
		{"", demand{milliCPUs: 1, memory: 1}, size{2, 257 * mib}},
		{"", demand{milliCPUs: 2000, memory: 512 * mib}, size{3, 768 * mib}},
		{"", demand{milliCPUs: 64_000, memory: 2 << 30}, size{4, 2 << 30}},
		{"", demand{cpus: []int{0, 1, 3}}, size{3, 256 * mib}},
		{"default_vcpus = 2\ndefault_maxvcpus = 3\ndefault_memory = 512\ndefault_maxmemory = 600", demand{milliCPUs: 2000, memory: 100 * mib}, size{3, 600 * mib}},
		{"default_memory = 512\ndefault_maxmemory = 100", demand{memory: mib}, size{1, 512 * mib}},
	} {
		cfg, _, err := config.Load(config.LoadOptions{Body: []byte("[hypervisor.qemu]\n" + c.config + "\n")})
		must(t, err)
		if got := boundsOf(cfg, testHost).fit(c.d); got != c.want {
			t.Errorf("%q, %+v: %+v; want %+v", c.config, c.d, got, c.want)
		}
	}
}

// Machines that are clones start with one size, as far as they can grow to theirs.
func TestStartOfClones(t *testing.T) {
	d := demand{milliCPUs: 2000, memory: 512 * mib}
	full, own := size{3, 768 * mib}, size{1, 256 * mib}
	for config, want := range map[string]size{
		"":                                     own,
		"[factory]\nenable_template = false\n": full,
		"[hypervisor.qemu]\nenable_hugepages = true\n":     full,
		"[hypervisor.qemu]\nenable_virtio_mem = false\n":   {own.cpus, full.memory},
		"[hypervisor.qemu]\nmachine_type = \"microvm\"\n":  full,
		"[runtime]\nstatic_sandbox_resource_mgmt = true\n": full,
	} {
		cfg, _, err := configOf(config)
		must(t, err)
		b := boundsOf(cfg, testHost)
		if got := b.start(d); got != want {
			t.Errorf("%q: starts with %+v; want %+v", config, got, want)
		}
		z := newSizer(testHost, b, d)
		if got, err := z.want(); err != nil || got != full {
			t.Errorf("%q: %+v, %v are wanted; want %+v", config, got, err, full)
		}
		h := &configuredQEMU{c: cfg}
		if got := h.ownSize(planVM(cfg, "a", "b", "", z)); got != (want == own) {
			t.Errorf("%q: of its own size: %v", config, got)
		}
	}
}

func configOf(body string) (*config.Config, []config.Warning, error) {
	return config.Load(config.LoadOptions{Body: []byte(body)})
}

func TestPlanPins(t *testing.T) {
	for _, c := range []struct {
		name  string
		sets  map[string][]int
		vcpus int
		want  string // CPUs of each vCPU
		guest map[string]string
	}{
		{"nobody is bound", map[string][]int{"a": nil}, 2, "[[] []]", nil},
		{"one to one", map[string][]int{"a": {2, 3}}, 2, "[[2] [3]]", map[string]string{"a": "0,1"}},
		{"the rest with the others", map[string][]int{"a": {3}}, 2, "[[3] [3]]", map[string]string{"a": "0"}},
		{"the rest free for one that is not bound", map[string][]int{"a": {3}, "b": nil}, 2, "[[3] []]", map[string]string{"a": "0"}},
		{"two containers", map[string][]int{"a": {1, 2}, "b": {2, 5}}, 4, "[[1] [2] [5] [1 2 5]]", map[string]string{"a": "0,1", "b": "1,2"}},
		{"more CPUs than vCPUs", map[string][]int{"a": {1, 2, 3}, "b": {1}}, 2, "[[1 3] [2]]", map[string]string{"a": "0,1", "b": "0"}},
	} {
		p := planPins(c.sets, c.vcpus)
		if got := fmt.Sprint(p.vcpus); got != c.want || !maps.Equal(p.guest, c.guest) {
			t.Errorf("%s: vCPUs on %s, containers on %v; want %s, %v", c.name, got, p.guest, c.want, c.guest)
		}
	}
}
