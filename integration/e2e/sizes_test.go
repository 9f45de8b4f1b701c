// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"
)

// sizedID is the first container of the pod whose machine changes its size.
const sizedID = "sized"

const mib = 1 << 20

// TestSizes: what a workload sees of a machine that grows and shrinks with the
// limits of its containers, in one pod.
func TestSizes(t *testing.T) {
	b := newBox(t)
	b.startSpec(sizedID, newSpec(t, "sleep", "100000").group(sizedID))
	for _, part := range []struct {
		name string
		test func(*box)
	}{
		{"Resize", testResize},
		{"FreedMemory", testFreedMemory},
		{"Pinning", testPinning},
		{"ForkBomb", testForkBomb},
		{"MemoryHog", testMemoryHog},
		{"BadSizes", testBadSizes},
		{"Limits", testLimits},
		{"CPUQuota", testCPUQuota},
		{"BadLimits", testBadLimits},
	} {
		t.Run(part.name, func(t *testing.T) { part.test(begin(t, b.c)) })
	}
}

// limits are a container's; zero values are none.
func limits(memory, quota int64, cpus string) *specs.LinuxResources {
	r := &specs.LinuxResources{}
	if memory != 0 {
		r.Memory = &specs.LinuxMemory{Limit: &memory}
	}
	if quota != 0 || cpus != "" {
		r.CPU = &specs.LinuxCPU{Cpus: cpus}
	}
	if quota != 0 {
		r.CPU.Quota = &quota
	}
	return r
}

// sizedMember is another container of that pod.
func sizedMember(t *testing.T, r *specs.LinuxResources, args ...string) *spec {
	s := newSpec(t, args...).group(sizedID)
	s.Linux.Resources.Memory, s.Linux.Resources.CPU, s.Linux.Resources.Pids = r.Memory, r.CPU, r.Pids
	return s
}

// update changes a container's limits as an engine does.
func (b *box) update(id string, r *specs.LinuxResources) error {
	b.Helper()
	data, err := json.Marshal(r)
	if err != nil {
		b.Fatal(err)
	}
	_, err = b.tasks().Update(calls(b.T), &tasksapi.UpdateTaskRequest{
		ContainerID: id, Resources: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources", Value: data},
	})
	return err
}

// seen is what a container sees of its machine: CPUs, and MiB of memory.
func (b *box) seen(id string) (cpus, memory int) {
	b.Helper()
	out := strings.Fields(b.shell(id, "nproc; grep MemTotal /proc/meminfo"))
	if len(out) < 3 {
		b.Fatalf("nproc and MemTotal: %q", out)
	}
	cpus, _ = strconv.Atoi(out[0])
	kib, _ := strconv.Atoi(out[2])
	return cpus, kib >> 10
}

// near tells whether a guest has that many MiB more than before: its kernel takes
// some of what it gets for itself.
func near(have, before, more int) bool { return have >= before+more-more/16-8 && have <= before+more+8 }

func testResize(b *box) {
	cpus, memory := b.seen(sizedID)
	b.startSpec("grown", sizedMember(b.T, limits(512*mib, 100_000, ""), "sleep", "100000"))
	if c, m := b.seen("grown"); c != cpus+1 || !near(m, memory, 512) {
		b.Errorf("with a container of one CPU and 512 MiB: %d CPUs, %d MiB; before %d, %d", c, m, cpus, memory)
	}
	if err := b.update("grown", limits(768*mib, 50_000, "")); err != nil {
		b.Fatal(err)
	}
	if c, m := b.seen("grown"); c != cpus+1 || !near(m, memory, 768) {
		b.Errorf("grown to 768 MiB: %d CPUs, %d MiB; before %d, %d", c, m, cpus, memory)
	}
	// All of it can be used.
	if got := b.shell("grown", "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max; dd if=/dev/zero of=/dev/null bs=600M count=1 2>&1 | tail -n 1"); !strings.HasPrefix(got, "805306368\n50000 100000\n1+0 records out") {
		b.Errorf("600 MiB in use: %q", got)
	}
	if err := b.update("grown", limits(64*mib, -1, "")); err != nil {
		b.Fatal(err)
	}
	c, m := b.seen("grown")
	kept := m - memory - 64
	b.Logf("of 704 MiB that were to be returned, %d MiB are kept", kept)
	if c != cpus || kept > 704*5/100 {
		b.Errorf("shrunk to 64 MiB: %d CPUs, %d MiB; before %d, %d", c, m, cpus, memory)
	}
	b.remove("grown")
}

// testFreedMemory: what a workload frees is the host's again.
func testFreedMemory(b *box) {
	b.startSpec("freed", sizedMember(b.T, limits(640*mib, 0, ""), "sleep", "100000"))
	vmm := b.family(sizedID).vmm
	before := vmRSS(b, vmm)
	reset := fmt.Sprintf("/proc/%d/clear_refs", vmm)
	if err := os.WriteFile(reset, []byte("5"), 0); err != nil { // the peak from now on (proc(5))
		b.Fatal(err)
	}
	b.shell("freed", "dd if=/dev/zero of=/dev/null bs=512M count=1 2>/dev/null")
	if grown := memoryOf(b, vmm, "VmHWM") - before; grown < 480*mib {
		b.Fatalf("512 MiB in the guest were %d bytes on the host", grown)
	}
	// The guest's kernel reports free pages every two seconds (mm/page_reporting.c).
	began, left := time.Now(), int64(0)
	for time.Since(began) < 40*time.Second {
		if left = vmRSS(b, vmm) - before; left <= 512*mib*15/100 {
			b.Logf("%d of 512 MiB are left on the host %v after they were freed", left/mib, time.Since(began).Round(100*time.Millisecond))
			b.remove("freed")
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	b.Errorf("%d of 512 MiB are still the guest's", left/mib)
	b.remove("freed")
}

// memoryOf is a line of /proc/<pid>/status that is in kB, in bytes.
func memoryOf(b *box, pid int, name string) int64 {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	n, err := strconv.ParseInt(strings.TrimSuffix(field(string(data), name), " kB"), 10, 64)
	if err != nil {
		b.Fatal(err)
	}
	return n << 10
}

func vmRSS(b *box, pid int) int64 { return memoryOf(b, pid, "VmRSS") }

// testPinning: CPUs of the host become vCPUs that are bound to them.
func testPinning(b *box) {
	last := strconv.Itoa(hostCPUs(b) - 1)
	b.startSpec("pinned", sizedMember(b.T, limits(0, 0, last), "sleep", "100000"))
	if got := b.shell("pinned", "cat /sys/fs/cgroup/cpuset.cpus; nproc"); got != "0\n1" {
		b.Errorf("bound to CPU %s of the host, the container is on %q of the guest; want its first one", last, got)
	}
	on := vcpuAffinity(b, sizedID)
	if len(on) == 0 || on[0] != last {
		b.Errorf("the vCPUs are bound to %q; want the first one on %s", on, last)
	}
	if err := b.update("pinned", limits(0, 0, "0-"+last)); err != nil {
		b.Fatal(err)
	}
	if got, want := b.shell("pinned", "nproc"), strconv.Itoa(hostCPUs(b)); got != want {
		b.Errorf("bound to CPUs 0-%s of the host, the container has %s CPUs", last, got)
	}
	if on = vcpuAffinity(b, sizedID); len(on) < hostCPUs(b) || on[0] != "0" || on[1] != "1" {
		b.Errorf("the vCPUs are bound to %q; want one to each CPU", on)
	}
	b.remove("pinned")
}

func hostCPUs(b *box) int {
	b.Helper()
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil || set.Count() < 2 {
		b.Fatalf("CPUs of the host: %d, %v; the tests need two", set.Count(), err)
	}
	return set.Count()
}

// vcpuAffinity are the CPUs of each vCPU's thread, which QEMU names "CPU 0/TCG" or "CPU 0/KVM".
func vcpuAffinity(b *box, pod string) []string {
	b.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", b.family(pod).vmm))
	if err != nil {
		b.Fatal(err)
	}
	byName := map[string]string{}
	var names []string
	for _, dir := range tasks {
		data, err := os.ReadFile(filepath.Join(dir, "status"))
		if name := field(string(data), "Name"); err == nil && strings.HasPrefix(name, "CPU ") {
			names = append(names, name)
			byName[name] = field(string(data), "Cpus_allowed_list")
		}
	}
	slices.Sort(names)
	var out []string
	for _, n := range names {
		out = append(out, byName[n])
	}
	return out
}

// testForkBomb: the neighbour of a container that forks without end answers.
func testForkBomb(b *box) {
	s := sizedMember(b.T, &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(40))}},
		"sh", "-c", "bomb() { bomb | bomb & }; bomb 2>/dev/null; while :; do sleep 1000 & wait; done 2>/dev/null")
	b.startSpec("bomb", s)
	if got := b.shell(sizedID, "echo alive"); got != "alive" {
		b.Errorf("the neighbour says %q", got)
	}
	b.remove("bomb")
}

// testMemoryHog: a container that takes more than its limit is killed, which is
// told, and its neighbours live.
func testMemoryHog(b *box) {
	seen := b.subscribe()
	boot := b.bootID(sizedID)
	b.startSpec("hog", sizedMember(b.T, limits(48*mib, 0, ""), "sh", "-c", "sleep 0.1; exec tail -c 200000000 /dev/zero"))
	topics := seen.until("hog", "/tasks/exit")
	r := b.ctr("tasks", "delete", "hog")
	if !strings.Contains(r.Stderr, "exit code 137") {
		b.Errorf("the hog's end: status %d, %s; want 137", r.Code, r.Stderr)
	}
	if !slices.ContainsFunc(topics, func(s string) bool { return strings.Contains(s, "/tasks/oom") }) {
		seen.until("hog", "/tasks/oom") // may come after the exit
	}
	if got := b.bootID(sizedID); got != boot {
		b.Error("the neighbour's machine has changed")
	}
	b.remove("hog")
}

// testBadSizes: what no machine can have is refused by its name, and nothing changes.
func testBadSizes(b *box) {
	cpus, memory := b.seen(sizedID)
	for _, bad := range []struct {
		name string
		r    *specs.LinuxResources
	}{
		{"linux.resources.memory.limit", limits(1<<50, 0, "")}, {"linux.resources.memory.limit", limits(-2, 0, "")},
		{"linux.resources.cpu.quota", limits(0, -5, "")}, {"linux.resources.cpu.cpus", limits(0, 0, "4096")},
	} {
		name, r := bad.name, bad.r
		if r := b.runSpec("bad", sizedMember(b.T, r, "true")); r.Code == 0 || !strings.Contains(r.Stderr, name) {
			b.Errorf("a container with a bad %s: status %d, %s", name, r.Code, r.Stderr)
		}
		if err := b.update(sizedID, r); err == nil || !strings.Contains(err.Error(), name) {
			b.Errorf("an update with a bad %s: %v", name, err)
		}
	}
	if c, m := b.seen(sizedID); c != cpus || m != memory {
		b.Errorf("the machine has %d CPUs, %d MiB; before %d, %d", c, m, cpus, memory)
	}
}
