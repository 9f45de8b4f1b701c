// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/integration/lab"
)

// files reads the first lines of files of the container's own cgroup, as the
// workload sees it; for a missing one it is "-". The shell does so by itself: what it
// ran would take its time from the container's quota.
func (b *box) files(id string, names ...string) map[string]string {
	b.Helper()
	script := `cd /sys/fs/cgroup; for f in ` + strings.Join(names, " ") + `; do v=-; [ -e $f ] && read -r v <$f; echo "$f $v"; done`
	out := map[string]string{}
	for line := range strings.Lines(b.shell(id, script)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		out[name] = value
	}
	return out
}

// holds compares files of a container's cgroup.
func (b *box) holds(when, id string, want map[string]string) {
	b.Helper()
	have := b.files(id, slices.Sorted(maps.Keys(want))...)
	for file, w := range want {
		if have[file] != w {
			b.Errorf("%s: %s is %q; want %q", when, file, have[file], w)
		}
	}
}

// limitedMember is a container of the sized pod that sleeps, with all of its limits given.
func limitedMember(t *testing.T, r *specs.LinuxResources) *spec {
	s := newSpec(t, "sleep", "100000").group(sizedID)
	devices := s.Linux.Resources.Devices
	s.Linux.Resources = r
	s.Linux.Resources.Devices = devices
	return s
}

// testLimits: every limit of the specification that a guest can hold is there as
// the workload sees it, at the start and after an update.
func testLimits(b *box) {
	b.startSpec("limits", limitedMember(b.T, &specs.LinuxResources{
		CPU: &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(30_000)), Period: ptr(uint64(60_000)), Burst: ptr(uint64(10_000)), Cpus: "0"},
		Memory: &specs.LinuxMemory{
			Limit: ptr(int64(64 * mib)), Swap: ptr(int64(80 * mib)), Reservation: ptr(int64(16 * mib)), Swappiness: ptr(uint64(10)),
		},
		Pids:           &specs.LinuxPids{Limit: ptr(int64(77))},
		HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 4 * mib}, {Pagesize: "64GB"}},
		Unified:        map[string]string{"memory.high": "50331648", "memory.oom.group": "1", "cpu.weight.nice": "3"},
	}))
	b.holds("at the start", "limits", map[string]string{
		"cpu.weight.nice": "3", "cpu.max": "30000 60000", "cpu.max.burst": "10000", "cpuset.cpus": "0",
		"memory.max": "67108864", "memory.swap.max": "16777216", "memory.low": "16777216", "memory.high": "50331648", "memory.oom.group": "1",
		"pids.max": "77", "hugetlb.2MB.max": "4194304", "hugetlb.2MB.rsvd.max": "4194304",
	})
	if err := b.update("limits", &specs.LinuxResources{
		CPU:    &specs.LinuxCPU{Shares: ptr(uint64(1024)), Period: ptr(uint64(50_000))},
		Memory: &specs.LinuxMemory{Limit: ptr(int64(96 * mib)), Swap: ptr(int64(96 * mib)), Reservation: ptr(int64(32 * mib))},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(-1))}, HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 2 * mib}},
		Unified: map[string]string{"memory.high": "max"},
	}); err != nil {
		b.Fatal(err)
	}
	b.holds("after an update", "limits", map[string]string{
		"cpu.weight": "39", "cpu.max": "30000 50000", "cpu.max.burst": "10000", "cpuset.cpus": "0",
		"memory.max": "100663296", "memory.swap.max": "0", "memory.low": "33554432", "memory.high": "max",
		"pids.max": "max", "hugetlb.2MB.max": "2097152", "hugetlb.2MB.rsvd.max": "2097152",
	})
	if err := b.update("limits", &specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: ptr(int64(20_000)), Burst: ptr(uint64(20_000))}}); err != nil {
		b.Fatal(err)
	}
	b.holds("after another", "limits", map[string]string{"cpu.max": "20000 50000", "cpu.max.burst": "20000", "memory.max": "100663296"})
	b.remove("limits")
}

// cpuWindow is over how long the use of CPU time is looked at.
const cpuWindow = 2 * time.Second

// testCPUQuota: what the guest's kernel counts for a container that would use all
// CPUs stays within its quota, whatever else the machine is doing.
func testCPUQuota(b *box) {
	const quota, period = 20_000, 100_000 // µs
	b.startSpec("busy", sizedMember(b.T, limits(0, quota, ""), "sh", "-c", "while :; do :; done & while :; do :; done"))
	look := func() *stats.CPUStat {
		r, err := b.tasks().Metrics(calls(b.T), &tasksapi.MetricsRequest{Filters: []string{"id==busy"}})
		if err != nil || len(r.Metrics) != 1 {
			b.Fatalf("metrics %v, %v", r, err)
		}
		var m stats.Metrics
		if err := typeurl.UnmarshalTo(r.Metrics[0].Data, &m); err != nil {
			b.Fatal(err)
		}
		return m.CPU
	}
	began := time.Now() // before the counter is read, and after it again: the window is never too short
	first := look()
	time.Sleep(cpuWindow)
	last := look()
	window, used := float64(time.Since(began).Microseconds()), float64(last.UsageUsec-first.UsageUsec)
	if most := window*quota/period*1.1 + quota; used > most || last.NrThrottled <= first.NrThrottled {
		b.Errorf("%.0f µs of CPU in %.0f µs, throttled %d times; want at most %.0f", used, window, last.NrThrottled-first.NrThrottled, most)
	}
	b.Logf("%.1f %% of a CPU in use, the quota is %d %%", used/window*100, quota*100/period)
	b.remove("busy")
}

// testBadLimits: what this guest cannot hold is refused by its name, and leaves nothing.
func testBadLimits(b *box) {
	for name, r := range map[string]*specs.LinuxResources{
		"hugetlb.64GB.max":  {HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "64GB", Limit: 1 << 36}}},
		`unified["io.max"]`: {Unified: map[string]string{"io.max": "8:0 rbps=1"}},
		`memory.no_such`:    {Unified: map[string]string{"memory.no_such": "1"}},
		"memory.swap":       {Memory: &specs.LinuxMemory{Limit: ptr(int64(2 * mib)), Swap: ptr(int64(mib))}},
		"memory.limit":      {Memory: &specs.LinuxMemory{Limit: ptr(int64(-2))}},
		"cpu.max":           {CPU: &specs.LinuxCPU{Quota: ptr(int64(1))}}, // the kernel wants 1 ms or more
	} {
		if r := b.runSpec("bad", limitedMember(b.T, r)); r.Code == 0 || !strings.Contains(r.Stderr, name) {
			b.Errorf("a container with a bad %s: status %d, %s", name, r.Code, r.Stderr)
		}
	}
	if got := b.shell(sizedID, "echo alive"); got != "alive" {
		b.Errorf("the neighbour says %q", got)
	}
}

// TestPrealloc: a machine that is to have its memory at once has it, and one whose
// huge pages the host has not is refused by name before anything runs.
func TestPrealloc(t *testing.T) {
	t.Setenv(lab.EnvTemplate, "") // which it excludes
	o := labOptions(t)
	o.Kata.Set = map[string]string{
		"hypervisor.qemu.enable_mem_prealloc": "true", "hypervisor.qemu.enable_annotations": `["enable_hugepages", "default_memory"]`,
	}
	b := newOwnBox(t, o)
	const prefix = "io.katacontainers.config.hypervisor."
	s := newSpec(t, "true")
	s.Annotations = map[string]string{prefix + "enable_hugepages": "true", prefix + "default_memory": "16777216"} // 16 TiB
	if r := b.runSpec("huge", s); r.Code == 0 || !strings.Contains(r.Stderr, "needs 8388608 huge pages") || !strings.Contains(r.Stderr, "hypervisor.qemu.enable_hugepages") {
		t.Errorf("huge pages that are not there: status %d, %s", r.Code, r.Stderr)
	}
	dir := t.TempDir()
	b.lowLimit(dir)
	b.startSpec("prealloc", newSpec(t, "sleep", "100000").mount("bind", dir, "/many", "rbind", "rw"))
	if rss := vmRSS(b, b.family("prealloc").vmm); rss < 256*mib {
		t.Errorf("the machine has %d of its 256 MiB", rss/mib)
	}
	b.knowsMore("prealloc")
	b.remove("prealloc")
	if os.Getenv(bulkEnv) != "" {
		b.onHugePages(prefix + "enable_hugepages")
	}
}

// hugePages is how many huge pages of 2 MiB the host reserves (kernel
// Documentation/admin-guide/mm/hugetlbpage.rst).
const hugePages = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"

// onHugePages runs a machine on pages that the host reserves for the moment.
func (b *box) onHugePages(annotation string) {
	b.Helper()
	was := strings.TrimSpace(readFile(b.T, hugePages))
	n, err := strconv.Atoi(was)
	if err != nil {
		b.Fatal(err)
	}
	const machine = 256 / 2 // MiB
	writeFile(b.T, strconv.Itoa(n+machine+8), hugePages)
	b.Cleanup(func() { writeFile(b.T, was, hugePages) })
	if got := strings.TrimSpace(readFile(b.T, hugePages)); got != strconv.Itoa(n+machine+8) {
		b.Fatalf("the host reserves %s huge pages of the %d that are wanted", got, n+machine+8)
	}
	s := newSpec(b.T, "sleep", "100000")
	s.Annotations = map[string]string{annotation: "true"}
	b.startSpec("huge", s)
	if got := b.shell("huge", "head -c 8388608 /dev/zero | wc -c"); got != "8388608" {
		b.Errorf("the machine on huge pages says %q", got)
	}
	// proc_pid_status(5): what the process has mapped of such pages, in kB.
	status := readFile(b.T, fmt.Sprintf("/proc/%d/status", b.family("huge").vmm))
	_, kb, _ := strings.Cut(status, "HugetlbPages:")
	if f := strings.Fields(kb); len(f) == 0 || f[0] != strconv.Itoa(256<<10) {
		b.Errorf("QEMU has%.20s of huge pages; want 256 MiB", kb)
	}
	b.remove("huge")
	writeFile(b.T, was, hugePages)
	if r := b.runSpec("huge", s); n < machine && (r.Code == 0 || !strings.Contains(r.Stderr, "needs 128 huge pages")) {
		b.Errorf("when the host has taken them back: status %d, %s", r.Code, r.Stderr)
	}
}
