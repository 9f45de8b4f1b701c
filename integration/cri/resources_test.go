// SPDX-License-Identifier: Apache-2.0

package cri

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/kata-v2/kata/sandbox/cgroup"
)

const mib = 1 << 20

// limitsOf are limits of CPU time (µs in each tenth of a second) and memory (bytes), 0 for none.
func limitsOf(quota, memory int64) *runtimeapi.LinuxContainerResources {
	return &runtimeapi.LinuxContainerResources{CpuPeriod: 100_000, CpuQuota: quota, MemoryLimitInBytes: memory}
}

// seen is what a container sees of its machine: CPUs, and MiB of memory.
func (c *container) seen() (cpus, memory int) {
	c.Helper()
	out := strings.Fields(c.shell("nproc; grep MemTotal /proc/meminfo"))
	if len(out) < 3 {
		c.Fatalf("nproc and MemTotal: %q", out)
	}
	cpus, _ = strconv.Atoi(out[0])
	kib, _ := strconv.Atoi(out[2])
	return cpus, kib >> 10
}

// hostGroup are the directories of the pod's cgroup.
func (p *pod) hostGroup() []cgroup.Dir {
	p.Helper()
	h, err := cgroup.Detect()
	p.ok(err)
	plan, err := h.Plan(cgroup.Request{Pod: p.id, Parent: p.config.Linux.CgroupParent})
	p.ok(err)
	return plan.Dirs
}

// hostLimits are the limits of a pod's cgroup: CPU time in each tenth of a second, bytes of memory.
func (p *pod) hostLimits() (quota, memory string) {
	p.Helper()
	for _, d := range p.hostGroup() {
		for file, to := range map[string]*string{
			"cpu.max": &quota, "cpu.cfs_quota_us": &quota, "memory.max": &memory, "memory.limit_in_bytes": &memory,
		} {
			if data, err := os.ReadFile(filepath.Join(d.Path, file)); err == nil {
				*to = strings.NewReplacer("max", "-1").Replace(strings.Fields(string(data))[0])
			}
		}
	}
	return quota, memory
}

// hostCPU is how much CPU time the pod's cgroup has used.
func (p *pod) hostCPU() time.Duration {
	p.Helper()
	for _, d := range p.hostGroup() {
		if data, err := os.ReadFile(filepath.Join(d.Path, "cpuacct.usage")); err == nil {
			n, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
			p.ok(err)
			return time.Duration(n)
		}
		if data, err := os.ReadFile(filepath.Join(d.Path, "cpu.stat")); err == nil && d.V2 {
			n, err := strconv.ParseInt(strings.Fields(string(data))[1], 10, 64) // "usage_usec <n>" is the first line
			p.ok(err)
			return time.Duration(n) * time.Microsecond
		}
	}
	p.Fatal("no cgroup counts CPU time: the tests need one")
	return 0
}

// hostWindow is over how long the machine's use of CPU time is looked at.
const hostWindow = 2 * time.Second

// testHostQuota: the whole machine of a pod with a quota, its VMM included, takes no
// more of the host than that and the overhead's, whatever runs inside.
func testHostQuota(p *pod) {
	const podQuota, overhead, period = 20_000, 40_000, 100_000 // µs
	p.start(p.script("while :; do :; done & while :; do :; done"))
	limit := func(quota, overhead int64) {
		p.Helper()
		must(p.runtime.UpdatePodSandboxResources(p.ctx(), &runtimeapi.UpdatePodSandboxResourcesRequest{
			PodSandboxId: p.id, Resources: limitsOf(quota, 64*mib), Overhead: limitsOf(overhead, own),
		}))(p)
	}
	limit(podQuota, overhead)
	began, first := time.Now(), p.hostCPU() // the clock is read around the counter: the window is never too short
	time.Sleep(hostWindow)
	used := p.hostCPU() - first
	window := time.Since(began)
	// What CPUs were given in the period before and have left (sched_cfs_bandwidth_slice_us) comes on top.
	most := window*(podQuota+overhead)/period*11/10 + 2*(podQuota+overhead)*time.Microsecond
	if used > most || used == 0 {
		p.Errorf("the machine used %v in %v; want at most %v", used, window, most)
	}
	p.Logf("%.1f %% of a CPU in use, the limit is %d %%", 100*used.Seconds()/window.Seconds(), (podQuota+overhead)*100/period)
	limit(-1, 100_000)
}

// own is how many bytes the machine may have beside its containers.
const own = 1 << 30

// TestResources: the size of a pod and what it uses, in one pod that has limits as a whole.
func TestResources(t *testing.T) {
	b := newBox(t, sandboxMode)
	p := b.run(func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.CgroupParent = "/kata-cri-" + strconv.Itoa(os.Getpid())
		c.Linux.Resources, c.Linux.Overhead = limitsOf(0, 64*mib), limitsOf(100_000, own)
	})
	t.Run("Resize", func(t *testing.T) { testResize(p.in(t)) })
	t.Run("HostQuota", func(t *testing.T) { testHostQuota(p.in(t)) })
	t.Run("Figures", func(t *testing.T) { testFigures(p.in(t)) })
	t.Run("DiskUsage", func(t *testing.T) { testDiskUsage(p.in(t)) })
}

// testResize: an in-place resize as the kubelet makes it, of the pod and of its
// container, seen by the workload and by the pod's cgroup on the host.
func testResize(p *pod) {
	const none = -1
	host := func(when string, quota, memory int64) {
		p.Helper()
		q, m := p.hostLimits()
		if q != strconv.FormatInt(quota, 10) || m != strconv.FormatInt(memory, 10) {
			p.Errorf("%s: the host allows %s µs, %s bytes; want %d, %d", when, q, m, quota, memory)
		}
	}
	update := func(c *container, quota, memory int64) {
		p.Helper()
		p.ok(p.runtime.UpdateContainerResources(p.ctx(), c.id, &runtimeapi.ContainerResources{Linux: limitsOf(quota, memory)}))
	}
	updatePod := func(quota, memory int64) {
		p.Helper()
		must(p.runtime.UpdatePodSandboxResources(p.ctx(), &runtimeapi.UpdatePodSandboxResourcesRequest{
			PodSandboxId: p.id, Resources: limitsOf(quota, memory), Overhead: limitsOf(100_000, own),
		}))(p)
	}
	host("at the start", none, own+64*mib)
	config := p.containerConfig("sleep", "100000")
	config.Linux.Resources = limitsOf(0, 64*mib)
	c := p.start(config)
	cpus, memory := c.seen()
	updatePod(100_000, 384*mib)
	host("the pod has grown", 200_000, own+384*mib)
	update(c, 100_000, 384*mib)
	if got := c.shell("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max"); got != "402653184\n100000 100000" {
		p.Errorf("limits of the container: %q", got)
	}
	if n, m := c.seen(); n != cpus+1 || m < memory+300 || m > memory+328 {
		p.Errorf("grown by one CPU and 320 MiB: %d CPUs, %d MiB; before %d, %d", n, m, cpus, memory)
	}
	update(c, none, 64*mib)
	updatePod(none, 64*mib)
	host("the pod has shrunk", none, own+64*mib)
	n, m := c.seen()
	if kept := m - memory; n != cpus || kept > 320*5/100 {
		p.Errorf("shrunk: %d CPUs, %d MiB are kept of 320; before %d", n, kept, cpus)
	}

	for field, r := range map[string]*runtimeapi.LinuxContainerResources{
		"memory.limit": limitsOf(0, 1<<50), "cpu.quota": limitsOf(-5, 0),
	} {
		if err := p.runtime.UpdateContainerResources(p.ctx(), c.id, &runtimeapi.ContainerResources{Linux: r}); err == nil || !strings.Contains(err.Error(), field) {
			p.Errorf("a container's bad %s: %v", field, err)
		}
		_, err := p.runtime.UpdatePodSandboxResources(p.ctx(), &runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: p.id, Resources: r})
		if err == nil || !strings.Contains(err.Error(), field) {
			p.Errorf("a pod's bad %s: %v", field, err)
		}
	}
	host("after what was refused", none, own+64*mib)
}

// testFigures: what crictl, kubelet and cAdvisor's successor read of a container and
// of its pod is there, and what is left below a limit is right.
func testFigures(p *pod) {
	config := p.script("dd if=/dev/zero of=/dev/shm/file bs=1M count=4 2>/dev/null; ls -lR /bin >/dev/null; echo up; sleep 100000")
	config.Linux.Resources = limitsOf(50_000, 64*mib)
	limited, free := p.start(config), p.sleeper()
	limited.awaitLog("up\n")
	stats := map[*container]*runtimeapi.ContainerStats{}
	for _, c := range []*container{limited, free} {
		s := must(p.runtime.ContainerStats(p.ctx(), c.id))(p)
		stats[c] = s
		m := s.GetMemory()
		for name, n := range map[string]uint64{
			"cpu": s.GetCpu().GetUsageCoreNanoSeconds().GetValue(), "usage": m.GetUsageBytes().GetValue(), "working set": m.GetWorkingSetBytes().GetValue(),
			"rss": m.GetRssBytes().GetValue(), "page faults": m.GetPageFaults().GetValue(),
		} {
			if n == 0 {
				p.Errorf("%s is nothing: %v", name, s)
			}
		}
		if m.MajorPageFaults == nil {
			p.Errorf("no major page faults: %v", s)
		}
		if c.shell("cat /proc/pressure/cpu >/dev/null 2>&1 && echo yes || echo no") == "yes" && (s.Cpu.Psi == nil || m.Psi == nil || s.GetIo().GetPsi() == nil) {
			p.Errorf("the guest knows of pressure, the figures do not: %v", s)
		}
	}
	m := stats[limited].Memory
	if left := m.AvailableBytes.Value; left != 64*mib-m.WorkingSetBytes.Value {
		p.Errorf("%d bytes are left of 64 MiB, the working set is %d", left, m.WorkingSetBytes.Value)
	}
	if left := stats[free].Memory.AvailableBytes.Value; left != 0 {
		p.Errorf("%d bytes are left of no limit", left)
	}
	pod := must(p.runtime.PodSandboxStats(p.ctx(), p.id))(p).Linux
	if n := pod.Memory.WorkingSetBytes.Value; n <= m.WorkingSetBytes.Value || pod.Memory.AvailableBytes.Value != 0 || pod.Process.ProcessCount.Value < 2 {
		p.Errorf("the pod: %v", pod)
	}
	for name, n := range p.metrics(limited.id) {
		switch name {
		case "container_memory_usage_bytes", "container_memory_working_set_bytes", "container_memory_rss", "container_memory_cache",
			"container_memory_max_usage_bytes", "container_spec_memory_limit_bytes", "container_spec_cpu_quota", "container_spec_cpu_period", "container_processes":
			if n == 0 {
				p.Errorf("metric %s is nothing", name)
			}
		}
	}
}

// metrics are a container's as a scraper gets them, by name.
func (p *pod) metrics(id string) map[string]uint64 {
	p.Helper()
	out := map[string]uint64{}
	for _, m := range must(p.runtime.ListPodSandboxMetrics(p.ctx()))(p) {
		for _, c := range m.ContainerMetrics {
			for _, x := range c.Metrics {
				if c.ContainerId == id {
					out[x.Name] = max(out[x.Name], x.Value.GetValue())
				}
			}
		}
	}
	return out
}
