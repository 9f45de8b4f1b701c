// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func ptr[T any](v T) *T { return &v }

// run1 runs a script of a specification and returns its output; it must end with 0.
func (b *box) run1(id string, s *spec) string {
	b.Helper()
	r := b.runSpec(id, s)
	if r.Code != 0 {
		b.Fatalf("status %d, stdout %q, stderr %q", r.Code, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(r.Stdout)
}

// field reads a line of /proc/self/status.
func field(status, name string) string {
	m := regexp.MustCompile(`(?m)^` + name + `:\s*(.*)$`).FindStringSubmatch(status)
	if m == nil {
		return ""
	}
	return strings.TrimSpace(m[1])
}

// testUser: ids, additional groups, environment and directory of the process.
func testUser(b *box) {
	s := script(b.T, "id -u; id -g; id -G; pwd; echo \"$A|$B\"; cat /proc/self/oom_score_adj")
	s.Process.User = specs.User{UID: 1000, GID: 1000, AdditionalGids: []uint32{10, 4242}}
	s.Process.Cwd, s.Process.OOMScoreAdj = "/home/user", ptr(100)
	s.Process.Env = append(s.Process.Env, "A=1 2", "B=ü=$x")
	if got, want := b.run1("user", s), "1000\n1000\n1000 10 4242\n/home/user\n1 2|ü=$x\n100"; got != want {
		b.Errorf("got %q, want %q", got, want)
	}
	s = script(b.T, "pwd; stat -c '%u %a' .")
	s.Process.Cwd = "/made/on/demand"
	if got, want := b.run1("cwd", s), "/made/on/demand\n0 755"; got != want {
		b.Errorf("a missing directory: got %q, want %q", got, want)
	}
}

// testCapabilities: the five sets, and no_new_privs.
func testCapabilities(b *box) {
	// Bits by linux/capability.h: CHOWN 0, KILL 5, NET_BIND_SERVICE 10, SYS_CHROOT 18.
	s := member(b.T, "cat", "/proc/self/status")
	s.Process.Capabilities = &specs.LinuxCapabilities{
		Bounding: []string{"CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT"}, Permitted: []string{"CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"},
		Effective: []string{"CAP_CHOWN", "CAP_KILL"}, Inheritable: []string{"CAP_NET_BIND_SERVICE"}, Ambient: []string{"CAP_NET_BIND_SERVICE"},
	}
	s.Process.User = specs.User{UID: 1000, GID: 1000}
	got := b.run1("caps", s)
	// After the exec of a user that is not root, what is ambient is what there is.
	bits := func(n ...uint) string {
		var v uint64
		for _, b := range n {
			v |= 1 << b
		}
		return fmt.Sprintf("%016x", v)
	}
	for name, want := range map[string]string{"CapBnd": bits(0, 5, 10, 18), "CapInh": bits(10), "CapAmb": bits(10), "CapPrm": bits(10), "CapEff": bits(10), "NoNewPrivs": "1"} {
		if f := field(got, name); f != want {
			b.Errorf("%s of a user is %s, want %s", name, f, want)
		}
	}
	s = member(b.T, "cat", "/proc/self/status")
	s.Process.NoNewPrivileges = false
	s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: []string{"CAP_CHOWN"}, Permitted: []string{"CAP_CHOWN"}, Effective: []string{"CAP_CHOWN"}}
	got = b.run1("caps", s)
	for name, want := range map[string]string{"CapBnd": bits(0), "CapInh": bits(), "CapPrm": bits(0), "CapEff": bits(0), "NoNewPrivs": "0"} {
		if f := field(got, name); f != want {
			b.Errorf("%s of root is %s, want %s", name, f, want)
		}
	}
}

// testRlimits: soft and hard limits as asked.
func testRlimits(b *box) {
	s := member(b.T, "cat", "/proc/self/limits")
	s.Process.Rlimits = []specs.POSIXRlimit{
		{Type: "RLIMIT_NOFILE", Soft: 100, Hard: 200}, {Type: "RLIMIT_CORE", Soft: 0, Hard: 0}, {Type: "RLIMIT_NPROC", Soft: 50, Hard: 60},
		// More than this host's root may have; the guest's may.
		{Type: "RLIMIT_MEMLOCK", Soft: 1 << 40, Hard: 1 << 40},
	}
	got := b.run1("limits", s)
	for _, want := range []string{`Max open files +100 +200`, `Max core file size +0 +0`, `Max processes +50 +60`, `Max locked memory +1099511627776 +1099511627776`} {
		if !regexp.MustCompile(want).MatchString(got) {
			b.Errorf("no line %q in:\n%s", want, got)
		}
	}
}

// testSeccomp: a filter answers in the guest, and so does an exec's.
func testSeccomp(b *box) {
	const text = "grep Seccomp: /proc/self/status; mkdir /tmp/never; echo $?; echo ok"
	s := script(b.T, text)
	s.Linux.Seccomp = &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86_64},
		Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat", "no_such_call_anywhere"}, Action: specs.ActErrno, ErrnoRet: ptr(uint(28))}}, // ENOSPC
	}
	r := b.runSpec("seccomp", s)
	if r.Code != 0 || strings.Join(strings.Fields(r.Stdout), " ") != "Seccomp: 2 1 ok" || !strings.Contains(r.Stderr, "No space left") {
		b.Errorf("got %+v; want the filter's own error", r)
	}
	r = b.run("seccomp2", []string{"--seccomp", "--annotation", groupAnnotation + "=" + podID}, "grep", "Seccomp:", "/proc/self/status")
	if r.Code != 0 || !strings.HasSuffix(strings.TrimSpace(r.Stdout), "2") {
		b.Errorf("containerd's default profile: %+v", r)
	}
	if got := b.shell(podID, "grep Seccomp: /proc/self/status"); !strings.HasSuffix(got, "0") {
		b.Errorf("without a profile: %s", got)
	}
}

// testPaths: masked paths read empty, read-only paths take no write.
func testPaths(b *box) {
	s := script(b.T, "head -c 10 /proc/kcore | wc -c; ls /proc/acpi 2>/dev/null | wc -l; cat /proc/masked-no-such 2>/dev/null; echo 1 >/proc/sys/kernel/msgmax; echo $?; ls /etc/masked | wc -l")
	s.Linux.MaskedPaths = append(s.Linux.MaskedPaths, "/proc/acpi", "/proc/masked-no-such", "/etc/masked")
	s.mount("bind", func() string { d := b.TempDir(); writeFile(b.T, "secret", d, "f"); return d }(), "/etc/masked", "rbind", "ro")
	r := b.runSpec("paths", s)
	if r.Stdout != "0\n0\n1\n0\n" || !strings.Contains(r.Stderr, "Read-only") {
		b.Errorf("got %+v", r)
	}
}

// testSysctl: of the container's own namespaces, and those of the pod's network.
func testSysctl(b *box) {
	s := script(b.T, "cat /proc/sys/kernel/msgmax /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start; hostname")
	s.Linux.Sysctl = map[string]string{"kernel.msgmax": "9000", "kernel.shm_rmid_forced": "1", "net.ipv4.ip_unprivileged_port_start": "99"}
	s.Hostname = "host-of-it"
	if got, want := b.run1("sysctl", s), "9000\n1\n99\nhost-of-it"; got != want {
		b.Errorf("got %q, want %q", got, want)
	}
	s = script(b.T, "true")
	s.Linux.Sysctl = map[string]string{"kernel.no_such_thing": "1"}
	if r := b.runSpec("sysctl", s); r.Code == 0 || !strings.Contains(r.Stderr, "no_such_thing") {
		b.Errorf("an unknown sysctl: %+v; want it named", r)
	}
}

// testDevices: the usual nodes, a node of the specification, and what the
// device list does not allow.
func testDevices(b *box) {
	s := script(b.T, `for d in null zero full random urandom tty ptmx; do test -c /dev/$d || echo no $d; done
		head -c 3 /dev/zero | wc -c; echo x >/dev/null; echo $?; echo x >/dev/mine; echo $?; stat -c '%t:%T %a %u %g' /dev/mine
		echo x >/dev/other; echo $?; test -L /dev/fd -a -L /dev/stdin && echo links`)
	s.Linux.Devices = []specs.LinuxDevice{
		{Path: "/dev/mine", Type: "c", Major: 1, Minor: 3, FileMode: ptr(os.FileMode(0o640)), UID: ptr(uint32(7)), GID: ptr(uint32(8))},
		{Path: "/dev/other", Type: "c", Major: 1, Minor: 11},
	}
	s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(3)), Access: "rwm"})
	r := b.runSpec("devices", s)
	if want := "3\n0\n0\n1:3 640 7 8\n1\nlinks\n"; r.Stdout != want || !strings.Contains(r.Stderr, "not permitted") {
		b.Errorf("stdout %q, want %q; stderr %q", r.Stdout, want, r.Stderr)
	}
}

// testResources: limits are those of the guest's cgroup, and they hold.
func testResources(b *box) {
	s := script(b.T, "cd /sys/fs/cgroup; cat memory.max memory.low pids.max cpu.max cpu.weight; for i in 1 2 3 4 5 6 7 8 9; do sleep 1 & done; wait")
	r := s.Linux.Resources
	r.Memory = &specs.LinuxMemory{Limit: ptr(int64(64 << 20)), Reservation: ptr(int64(32 << 20))}
	r.Pids = &specs.LinuxPids{Limit: ptr(int64(8))}
	r.CPU = &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(25000)), Period: ptr(uint64(50000))}
	got := b.runSpec("resources", s)
	lines := strings.Fields(got.Stdout)
	// The weight of 512 shares depends on the engine's formula; it is below the default of 100.
	if want := []string{"67108864", "33554432", "8", "25000", "50000"}; len(lines) != 6 || !slices.Equal(lines[:5], want) || lines[5] >= "9" && len(lines[5]) == 3 {
		b.Errorf("limits %q, want %q and a weight below 100; %s", lines, want, got.Stderr)
	}
	if !strings.Contains(got.Stderr, "fork") {
		b.Errorf("ten processes under a limit of eight: %+v", got)
	}
	s = script(b.T, "tail -c 100000000 /dev/zero; echo no")
	s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr(int64(32 << 20))}
	if got := b.runSpec("oom", s); !strings.Contains(got.Stderr, "Killed") && got.Code != 137 {
		b.Errorf("100 MB under a limit of 32 MiB: %+v", got)
	}
}
