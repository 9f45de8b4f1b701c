// SPDX-License-Identifier: Apache-2.0

package cgroups

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/internal/bpf"
)

func p[T any](v T) *T { return &v }

func TestPlan(t *testing.T) {
	for _, c := range []struct {
		name string
		in   specs.LinuxResources
		want []Setting
	}{
		{"empty", specs.LinuxResources{}, nil},
		{"cpu", specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: p(uint64(1024)), Quota: p(int64(50000)), Period: p(uint64(100000)), Cpus: "0-1", Mems: "0"}},
			[]Setting{{"cpu.weight", "39", false}, {"cpu.max", "50000 100000", false}, {"cpuset.cpus", "0-1", false}, {"cpuset.mems", "0", false}}},
		{"cpu extremes", specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: p(uint64(1))}}, []Setting{{"cpu.weight", "1", false}}},
		{"cpu top", specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: p(uint64(1 << 30))}}, []Setting{{"cpu.weight", "10000", false}}},
		{"no quota", specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: p(int64(-1)), Period: p(uint64(100000))}}, []Setting{{"cpu.max", "max 100000", false}}},
		{"memory", specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: p(int64(100)), Swap: p(int64(150)), Reservation: p(int64(50))}},
			[]Setting{{"memory.max", "100", false}, {"memory.swap.max", "50", true}, {"memory.low", "50", false}}},
		{"no memory limit", specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: p(int64(-1)), Swap: p(int64(-1))}},
			[]Setting{{"memory.max", "max", false}, {"memory.swap.max", "max", true}}},
		{"pids", specs.LinuxResources{Pids: &specs.LinuxPids{Limit: p(int64(0))}}, []Setting{{"pids.max", "max", false}}},
		{"io", specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{Weight: p(uint16(1000)), ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{throttle(254, 0, 1<<20)},
			ThrottleWriteIOPSDevice: []specs.LinuxThrottleDevice{throttle(254, 16, 0)}}},
			[]Setting{{"io.weight", "10000", true}, {"io.max", "254:0 rbps=1048576", false}, {"io.max", "254:16 wiops=max", false}}},
		{"huge", specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 4 << 20}}}, []Setting{{"hugetlb.2MB.max", "4194304", false}, {"hugetlb.2MB.rsvd.max", "4194304", true}}},
		{"huge pages of a size that may be missing", specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "1GB"}}}, []Setting{{"hugetlb.1GB.max", "0", true}, {"hugetlb.1GB.rsvd.max", "0", true}}},
		{"unified", specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: p(int64(5000))}, Unified: map[string]string{"memory.high": "7", "cpu.max.burst": "1000"}},
			[]Setting{{"cpu.max.burst", "0", false}, {"cpu.max", "5000", false}, {"cpu.max.burst", "1000", false}, {"memory.high", "7", false}}},
	} {
		got, err := Plan(&c.in)
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, %v; want %v", c.name, got, err, c.want)
		}
	}
	for _, bad := range []specs.LinuxMemory{{Swap: p(int64(10))}, {Limit: p(int64(20)), Swap: p(int64(10))}} {
		if _, err := Plan(&specs.LinuxResources{Memory: &bad}); fault.KindOf(err) != fault.InvalidArgument {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

func TestUnifiedNames(t *testing.T) {
	for _, file := range []string{"cgroup.procs", "../memory.max", "x/memory.max", "tasks", ""} {
		if _, err := Plan(&specs.LinuxResources{Unified: map[string]string{file: "1"}}); fault.KindOf(err) != fault.InvalidArgument {
			t.Errorf("%q: %v", file, err)
		}
	}
}

func throttle(major, minor int64, rate uint64) specs.LinuxThrottleDevice {
	d := specs.LinuxThrottleDevice{Rate: rate}
	d.Major, d.Minor = major, minor
	return d
}

// run executes a device program like the kernel would, for the few instructions it uses.
func run(t *testing.T, prog []bpf.Insn, kind, access, major, minor uint32) bool {
	t.Helper()
	ctx := []uint32{access<<16 | kind, major, minor}
	var r [11]uint32
	for pc, steps := 0, 0; ; pc, steps = pc+1, steps+1 {
		if pc < 0 || pc >= len(prog) || steps > 1000 {
			t.Fatalf("the program leaves itself at %d", pc)
		}
		in := prog[pc]
		dst, src := in.Regs&15, in.Regs>>4
		switch in.Code {
		case opLoadW:
			r[dst] = ctx[in.Off/4]
		case opMovReg:
			r[dst] = r[src]
		case opMovImm:
			r[dst] = uint32(in.Imm)
		case opAnd:
			r[dst] &= uint32(in.Imm)
		case opRsh:
			r[dst] >>= uint32(in.Imm)
		case opJne:
			if r[dst] != uint32(in.Imm) {
				pc += int(in.Off)
			}
		case opJneReg:
			if r[dst] != r[src] {
				pc += int(in.Off)
			}
		case opJeqZero:
			if r[dst] == uint32(in.Imm) {
				pc += int(in.Off)
			}
		case opExit:
			return r[regRet] == 1
		default:
			t.Fatalf("instruction %#x", in.Code)
		}
	}
}

// The rules of ctr and of the CRI make the programs that a template has loaded,
// whatever their order; what denies something makes another one.
func TestUsualRulesMakeOneProgram(t *testing.T) {
	text := func(rules ...specs.LinuxDeviceCgroup) []bpf.Insn {
		t.Helper()
		prog, err := deviceProgram(withUsual(rules))
		if err != nil {
			t.Fatal(err)
		}
		return prog
	}
	device := func(allow bool, major, minor int64, access string) specs.LinuxDeviceCgroup {
		return specs.LinuxDeviceCgroup{Allow: allow, Type: "c", Major: &major, Minor: &minor, Access: access}
	}
	none := specs.LinuxDeviceCgroup{Access: "rwm"}
	null, full, console := device(true, 1, 3, "rwm"), device(true, 1, 7, "rwm"), device(true, 5, 1, "rwm")
	terminals := specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: p(int64(136)), Access: "rwm"}
	if !slices.Equal(text(none, full, null, terminals), text(none)) {
		t.Error("usual devices that are allowed once more make another program")
	}
	if !slices.Equal(text(none, null, console, full), text(none, console)) {
		t.Error("the usual devices and the console make another program than the console")
	}
	const c, w = unix.BPF_DEVCG_DEV_CHAR, unix.BPF_DEVCG_ACC_WRITE
	denied := text(none, device(false, 1, 3, "w"), full, null)
	if slices.Equal(denied, text(none)) || !run(t, denied, c, w, 1, 3) {
		t.Error("a device that is denied, then allowed, is not allowed")
	}
	if run(t, text(none, null, device(false, 1, 3, "w")), c, w, 1, 3) {
		t.Error("a device that is allowed, then denied, is allowed")
	}
}

// A program that was prepared is used, and another one is loaded beside it.
func TestPreparedDevices(t *testing.T) {
	load := func([]bpf.Insn) (int, error) { return unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0) }
	m := Manager{devices: programs{load: load}}
	if err := m.PrepareDevices(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, l := range m.devices.loaded {
			unix.Close(l.fd)
		}
	})
	for i, l := range m.devices.loaded {
		fd, release, err := m.devices.program(slices.Clone(l.text))
		if err != nil || fd != l.fd {
			t.Errorf("prepared program %d: descriptor %d, %v; want %d", i, fd, err, l.fd)
		}
		release()
		if _, err := unix.FcntlInt(uintptr(l.fd), unix.F_GETFD, 0); err != nil {
			t.Errorf("prepared program %d is gone after its use: %v", i, err)
		}
	}
	fd, release, err := m.devices.program(verdict(true))
	if err != nil || slices.ContainsFunc(m.devices.loaded, func(l program) bool { return l.fd == fd }) {
		t.Fatalf("another program: descriptor %d, %v", fd, err)
	}
	release()
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
		t.Error("a program that was not prepared stays")
	}
}

func TestDeviceProgram(t *testing.T) {
	const b, c, m, r, w = unix.BPF_DEVCG_DEV_BLOCK, unix.BPF_DEVCG_DEV_CHAR, unix.BPF_DEVCG_ACC_MKNOD, unix.BPF_DEVCG_ACC_READ, unix.BPF_DEVCG_ACC_WRITE
	prog, err := deviceProgram([]specs.LinuxDeviceCgroup{
		{Allow: false, Access: "rwm"},
		{Allow: true, Type: "c", Access: "m"},
		{Allow: true, Type: "c", Major: p(int64(1)), Minor: p(int64(3)), Access: "rwm"},
		{Allow: true, Type: "b", Major: p(int64(254)), Access: "r"},
		{Allow: false, Type: "c", Major: p(int64(1)), Minor: p(int64(9)), Access: "m"},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		kind, access, major, minor uint32
		want                       bool
	}{
		{c, r | w, 1, 3, true}, {c, m, 9, 9, true}, {c, r, 9, 9, false}, {c, r | m, 9, 9, false},
		{b, r, 254, 7, true}, {b, w, 254, 7, false}, {b, r | w, 254, 7, false}, {b, r, 8, 0, false},
		{b, m, 1, 3, false}, {c, m, 1, 9, false},
	} {
		if got := run(t, prog, x.kind, x.access, x.major, x.minor); got != x.want {
			t.Errorf("%+v: %v", x, got)
		}
	}
	all, err := deviceProgram([]specs.LinuxDeviceCgroup{{Allow: false}, {Allow: true, Type: "a", Access: "rwm"}})
	if err != nil || !run(t, all, c, r, 5, 5) {
		t.Errorf("allow all: %v", err)
	}
	for _, bad := range []specs.LinuxDeviceCgroup{{Type: "x", Access: "r"}, {Type: "c", Access: "q"}, {Type: "c"}} {
		if _, err := deviceProgram([]specs.LinuxDeviceCgroup{bad}); fault.KindOf(err) != fault.InvalidArgument {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

// fake makes a directory that looks like a group.
func fake(t *testing.T, files map[string]string) *Group {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	w, err := NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); w.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return &Group{dir: dir, watch: w, devices: &programs{}}
}

func TestStats(t *testing.T) {
	g := fake(t, map[string]string{
		"cpu.stat":       "usage_usec 5\nuser_usec 3\nsystem_usec 2\nnr_periods 7\nnr_throttled 1\nthrottled_usec 9\n",
		"memory.current": "4096\n", "memory.max": "max\n", "memory.stat": "file 100\nkernel 50\nanon 7\n",
		"memory.events": "low 0\nhigh 0\nmax 4\noom 0\noom_kill 0\n",
		"pids.current":  "3\n", "pids.max": "10\n",
		"io.stat":             "254:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n",
		"cpu.pressure":        "some avg10=1.50 avg60=0.25 avg300=0.00 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5\n",
		"hugetlb.2MB.max":     "4194304\n",
		"hugetlb.2MB.current": "2097152\n", "hugetlb.2MB.events": "max 6\n", "hugetlb.2MB.rsvd.current": "0\n",
	})
	s, err := g.Stats()
	if err != nil {
		t.Fatal(err)
	}
	if s.CpuStats.CpuUsage.TotalUsage != 5000 || s.CpuStats.ThrottlingData.ThrottledTime != 9000 {
		t.Errorf("cpu %v", s.CpuStats)
	}
	if m := s.MemoryStats; m.Usage.Usage != 4096 || m.Usage.Limit != 0 || m.Usage.Failcnt != 4 || m.Cache != 100 || m.KernelUsage.Usage != 50 || m.Stats["anon"] != 7 {
		t.Errorf("memory %v", m)
	}
	if s.PidsStats.Current != 3 || s.PidsStats.Limit != 10 || len(s.BlkioStats.IoServiceBytesRecursive) != 3 || s.BlkioStats.IoServiceBytesRecursive[1].Value != 20 {
		t.Errorf("pids %v, io %v", s.PidsStats, s.BlkioStats)
	}
	if h := s.HugetlbStats["2MB"]; len(s.HugetlbStats) != 1 || h.Usage != 2<<20 || h.Failcnt != 6 || h.Limit != 4<<20 {
		t.Errorf("huge pages %v", s.HugetlbStats)
	}
	if c := s.Pressure["cpu"]; len(s.Pressure) != 1 || c.Some.Avg10 != 1.5 || c.Some.Avg60 != 0.25 || c.Some.Total != 77 || c.Full.Total != 5 {
		t.Errorf("pressure %v", s.Pressure)
	}
	if e := s.MemoryStats.Events; e["max"] != 4 {
		t.Errorf("events %v", e)
	}
}

func TestFreezeWaitsForTheKernel(t *testing.T) {
	g := fake(t, map[string]string{"cgroup.freeze": "0", "cgroup.events": "populated 1\nfrozen 0\n"})
	done := make(chan error, 1)
	go func() { done <- g.Freeze(context.Background(), true) }()
	select {
	case err := <-done:
		t.Fatalf("returned before the kernel froze: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	// One write, as the kernel changes the file at once.
	f, err := os.OpenFile(filepath.Join(g.dir, "cgroup.events"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("populated 1\nfrozen 1\n"); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := g.WaitEmpty(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a populated group: %v", err)
	}
	if len(g.watch.subs) != 0 {
		t.Errorf("watches left: %v", g.watch.subs)
	}
}

func TestOOMCountsOnlyNewKills(t *testing.T) {
	g := fake(t, map[string]string{"memory.events": "oom 0\noom_kill 0\n"})
	ctx, cancel := context.WithCancel(context.Background())
	hits := make(chan struct{}, 8)
	done := make(chan error, 1)
	go func() { done <- g.WatchOOM(ctx, func() { hits <- struct{}{} }) }()
	path := filepath.Join(g.dir, "memory.events")
	if err := os.WriteFile(path, []byte("oom 1\noom_kill 1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	<-hits
	if err := os.WriteFile(path, []byte("oom 2\noom_kill 1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err != nil || len(hits) != 0 {
		t.Errorf("%v, %d more", err, len(hits))
	}
}

func TestApplyNamesTheMissingFile(t *testing.T) {
	g := fake(t, map[string]string{"memory.max": ""})
	err := g.Apply(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: p(int64(5)), Swap: p(int64(5))}})
	if err != nil {
		t.Errorf("a kernel without swap accounting: %v", err)
	}
	if b, _ := os.ReadFile(filepath.Join(g.dir, "memory.max")); string(b) != "5" {
		t.Errorf("memory.max %q", b)
	}
	err = g.Apply(&specs.LinuxResources{Pids: &specs.LinuxPids{Limit: p(int64(5))}})
	if fault.KindOf(err) != fault.FailedPrecondition {
		t.Errorf("missing pids.max: %v", err)
	}
}
