// SPDX-License-Identifier: Apache-2.0

package guestagent_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

func testLimits(t *testing.T, g *guest) {
	s := spec("sh", "-c", "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight; cat; cat memory.max")
	s.Linux.Resources = &agentpb.LinuxResources{
		Memory: &agentpb.LinuxMemory{Limit: 64 << 20},
		Pids:   &agentpb.LinuxPids{Limit: 50},
		CPU:    &agentpb.LinuxCPU{Shares: 512, Quota: 50000, Period: 100000},
	}
	b := g.create(t, "limits", s).start()
	out := bufferOf(b.out)
	out.until(t, "67108864\n50\n50000 100000\n20\n")
	if _, err := g.UpdateContainer(bounded(t), &agentpb.UpdateContainerRequest{ContainerId: b.id, Resources: &agentpb.LinuxResources{
		Memory: &agentpb.LinuxMemory{Limit: 128 << 20}}}); err != nil {
		t.Fatal(err)
	}
	b.in.(interface{ CloseWrite() error }).CloseWrite()
	out.until(t, "134217728\n")
	bad := spec("true")
	bad.Linux.Resources = &agentpb.LinuxResources{CPU: &agentpb.LinuxCPU{Cpus: "77"}}
	_, err := g.CreateContainer(bounded(t), &agentpb.CreateContainerRequest{ContainerId: "badlimit", OCI: bad})
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "cpuset.cpus") {
		t.Errorf("a CPU that is not there: %v", err)
	}
}

func testDevices(t *testing.T, g *guest) {
	s := spec("sh", "-c", "echo x >/dev/null && echo null; mknod /tmp/c c 4 64 && echo made; cat /tmp/c 2>/dev/null && echo read; dd if=/dev/zero bs=1 count=1 2>/dev/null | wc -c")
	s.Linux.Resources = &agentpb.LinuxResources{Devices: []*agentpb.LinuxDeviceCgroup{
		{Allow: false, Access: "rwm"},
		{Allow: true, Type: "c", Major: -1, Minor: -1, Access: "m"},
		{Allow: true, Type: "c", Major: 1, Minor: 3, Access: "rwm"},
		{Allow: true, Type: "c", Major: 1, Minor: 5, Access: "r"},
	}}
	b := g.create(t, "dev", s).start()
	if got := read(t, b.out); got != "null\nmade\n1\n" {
		t.Errorf("stdout %q, stderr %q", got, read(t, b.err))
	}
}

func testOOM(t *testing.T, g *guest) {
	s := spec("sh", "-c", "sleep 0.2; tail /dev/zero; exit 1")
	s.Linux.Resources = &agentpb.LinuxResources{Memory: &agentpb.LinuxMemory{Limit: 16 << 20, Swap: 16 << 20}}
	b := g.create(t, "oom", s).start()
	ev, err := g.GetOOMEvent(bounded(t), &agentpb.GetOOMEventRequest{})
	if err != nil || ev.ContainerId != b.id {
		t.Errorf("event %v, %v", ev, err)
	}
	b.wait("")
}

func testPause(t *testing.T, g *guest) {
	b := g.create(t, "pause", spec("sh", "-c", "while :; do echo tick; sleep 0.02; done")).start()
	out := bufferOf(b.out)
	out.until(t, "tick")
	if _, err := g.PauseContainer(bounded(t), &agentpb.PauseContainerRequest{ContainerId: b.id}); err != nil {
		t.Fatal(err)
	}
	_, err := g.ExecProcess(bounded(t), &agentpb.ExecProcessRequest{ContainerId: b.id, ExecId: "e", Process: process("true")})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "paused") {
		t.Errorf("exec in a paused container: %v", err)
	}
	if _, err := g.ResumeContainer(bounded(t), &agentpb.ResumeContainerRequest{ContainerId: b.id}); err != nil {
		t.Fatal(err)
	}
	if _, err := g.PauseContainer(bounded(t), &agentpb.PauseContainerRequest{ContainerId: b.id}); err != nil {
		t.Fatal(err)
	}
	if err := b.signal("", 9); err != nil { // a frozen container dies as well
		t.Fatal(err)
	}
	if code := b.wait(""); code != 137 {
		t.Errorf("status %d", code)
	}
}

func testStats(t *testing.T, g *guest) {
	b := g.create(t, "stats", spec("sleep", "1000")).start()
	r, err := g.StatsContainer(bounded(t), &agentpb.StatsContainerRequest{ContainerId: b.id})
	if err != nil {
		t.Fatal(err)
	}
	c := r.CgroupStats
	if c.GetCpuStats().GetCpuUsage().GetTotalUsage() == 0 || c.GetMemoryStats().GetUsage().GetUsage() == 0 || c.GetPidsStats().GetCurrent() != 1 {
		t.Errorf("stats %v", r)
	}
}

// testPod: containers of a pod share ipc and uts, and the pid namespace when asked.
func testPod(t *testing.T, g *guest) {
	inPod := func(kind string, args ...string) *agentpb.Spec {
		s := spec(args...)
		s.Annotations = map[string]string{"io.kubernetes.cri.container-type": kind}
		return s
	}
	shared := func(r *agentpb.CreateContainerRequest) { r.SandboxPidns = true }
	g.create(t, "pause0", inPod("sandbox", "sleep", "1000"), shared).start()
	show := "for n in ipc uts pid; do readlink /proc/self/ns/$n; done; hostname"
	a := g.create(t, "ctr1", inPod("container", "sh", "-c", show), shared).start()
	b := g.create(t, "ctr2", inPod("container", "sh", "-c", show), shared).start()
	c := g.create(t, "alone", spec("sh", "-c", show)).start()
	x, y, z := read(t, a.out), read(t, b.out), read(t, c.out)
	if x != y || !strings.Contains(x, "pod1\n") {
		t.Errorf("namespaces of one pod differ:\n%s\n%s", x, y)
	}
	xs, zs := strings.Split(x, "\n"), strings.Split(z, "\n")
	if len(xs) != len(zs) {
		t.Fatalf("%q and %q", x, z)
	}
	for i := range 3 {
		if xs[i] == zs[i] {
			t.Errorf("a container of its own shares %s", zs[i])
		}
	}
}

// testStorage: guest memory, a writable overlay as root, and a file that the host copies.
func testStorage(t *testing.T, g *guest) {
	const file = protocols.GuestSharedDir + "/conf"
	if _, err := g.CopyFile(bounded(t), &agentpb.CopyFileRequest{Path: file, FileSize: 4, FileMode: 0o644, Data: []byte("conf")}); err != nil {
		t.Fatal(err)
	}
	s := spec("sh", "-c", "cat /conf; echo x >/new && cat /new; mount | grep -c '/mem type tmpfs.*size=1024k'; cat /etc/resolv.conf")
	s.Root.Path = protocols.GuestRunDir + "/store/rootfs"
	s.Mounts = append(s.Mounts,
		&agentpb.Mount{Destination: "/conf", Type: "bind", Source: file, Options: []string{"bind", "ro"}},
		&agentpb.Mount{Destination: "/mem", Type: "bind", Source: protocols.GuestSandboxDir + "/ephemeral/m", Options: []string{"bind"}},
		&agentpb.Mount{Destination: "/etc/resolv.conf", Type: "bind", Source: protocols.GuestSandboxDir + "/resolv.conf", Options: []string{"bind"}})
	b := g.create(t, "store", s, func(r *agentpb.CreateContainerRequest) {
		r.Storages = []*agentpb.Storage{
			{Driver: "ephemeral", Source: "tmpfs", Fstype: "tmpfs", MountPoint: protocols.GuestSandboxDir + "/ephemeral/m", Options: []string{"size=1m"}},
			{Driver: "overlayfs", Source: "overlay", Fstype: "overlay", MountPoint: s.Root.Path,
				Options: []string{"lowerdir=/test/rootfs", "io.katacontainers.fs-opt.overlay-rw"}},
		}
	}).start()
	if got, want := read(t, b.out), "confx\n1\nnameserver 192.0.2.1\noptions ndots:5\n"; got != want {
		t.Errorf("stdout %q, want %q; stderr %q", got, want, read(t, b.err))
	}
	_, err := g.CreateContainer(bounded(t), &agentpb.CreateContainerRequest{ContainerId: "nodisk", OCI: spec("true"),
		Storages: []*agentpb.Storage{{Driver: "blk", Source: "1e/07", Fstype: "ext4", MountPoint: "/run/x"}}})
	if status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), "1e/07") {
		t.Errorf("a disk that never comes: %v", err)
	}
}

func testReadonly(t *testing.T, g *guest) {
	s := spec("sh", "-c", "exec 2>&1; touch /x; echo 1 >/proc/sys/kernel/pid_max; cat /proc/keys | wc -c")
	s.Root.Readonly = true
	b := g.create(t, "ro", s).start()
	if got := read(t, b.out); strings.Count(got, "Read-only file system") != 2 || !strings.HasSuffix(got, "\n0\n") {
		t.Errorf("stdout %q", got)
	}
}

func testSeccomp(t *testing.T, g *guest) {
	s := spec("sh", "-c", "mknod /tmp/s c 1 3 || echo refused")
	s.Linux.Seccomp = &agentpb.LinuxSeccomp{DefaultAction: "SCMP_ACT_ALLOW", Architectures: []string{"SCMP_ARCH_X86_64"},
		Syscalls: []*agentpb.LinuxSyscall{{Names: []string{"mknod", "mknodat"}, Action: "SCMP_ACT_ERRNO"}}}
	b := g.create(t, "seccomp", s).start()
	if got := read(t, b.out); got != "refused\n" {
		t.Errorf("stdout %q", got)
	}
}

// testNullStdio: no ports mean no stdio, and the process is not blocked by what it writes.
func testNullStdio(t *testing.T, g *guest) {
	none := func(r *agentpb.CreateContainerRequest) { r.StdinPort, r.StdoutPort, r.StderrPort = 0, 0, 0 }
	b := g.create(t, "null", spec("dd", "if=/dev/zero", "bs=64k", "count=32"), none).start()
	if code := b.wait(""); code != 0 {
		t.Errorf("status %d", code)
	}
}

func testRemoveRunning(t *testing.T, g *guest) {
	b := g.create(t, "rm", spec("sh", "-c", "sleep 1000 & sleep 1000")).start()
	b.exec("e", process("sleep", "1000"))
	start := time.Now()
	b.remove()
	t.Logf("removed a running container in %v", time.Since(start))
	if _, err := g.RemoveContainer(bounded(t), &agentpb.RemoveContainerRequest{ContainerId: "rm"}); status.Code(err) != codes.NotFound {
		t.Errorf("second removal: %v", err)
	}
	// Never started.
	g.create(t, "rm2", spec("true")).remove()
}

func testMany(t *testing.T, g *guest) {
	b := g.create(t, "many", spec("sleep", "1000")).start()
	done := make(chan error, 8)
	for i := range 8 {
		go func() {
			id := fmt.Sprintf("m%d", i)
			_, err := g.ExecProcess(bounded(t), &agentpb.ExecProcessRequest{ContainerId: b.id, ExecId: id, Process: process("sh", "-c", fmt.Sprintf("exit %d", i))})
			if err == nil {
				var r *agentpb.WaitProcessResponse
				if r, err = g.WaitProcess(bounded(t), &agentpb.WaitProcessRequest{ContainerId: b.id, ExecId: id}); err == nil && int(r.Status) != i {
					err = fmt.Errorf("%s: status %d", id, r.Status)
				}
			}
			done <- err
		}()
	}
	for range 8 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// testClean: removed containers leave no mount, cgroup, file or goroutine.
func testClean(t *testing.T, g *guest) {
	s := spec("sh", "-c", "cat /guestproc/1/mountinfo; ls /guestrun /guestcg /guestcrun; ls /guestproc/1/fd | wc -l")
	s.Mounts = append(s.Mounts,
		&agentpb.Mount{Destination: "/guestproc", Type: "bind", Source: "/proc", Options: []string{"rbind", "ro"}},
		&agentpb.Mount{Destination: "/guestrun", Type: "bind", Source: "/run/kata-containers", Options: []string{"bind"}},
		&agentpb.Mount{Destination: "/guestcg", Type: "bind", Source: "/sys/fs/cgroup/kata", Options: []string{"bind"}},
		&agentpb.Mount{Destination: "/guestcrun", Type: "bind", Source: "/run/crun", Options: []string{"bind"}})
	b := g.create(t, "clean", s).start()
	out := read(t, b.out)
	for _, id := range []string{"out", "exec", "tty", "digest", "pause0", "rm", "many", "missing", "badlimit", "store", "ephemeral", "nodisk"} {
		for _, line := range strings.Split(out, "\n") {
			if line == id || strings.Contains(line, "/"+id+"/") {
				t.Errorf("left of %s: %s", id, line)
			}
		}
	}
	if !strings.Contains(out, "clean\n") {
		t.Errorf("the check sees nothing: %s (%s)", out, read(t, b.err))
	}
	m, err := g.GetMetrics(bounded(t), &agentpb.GetMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(m.Metrics, "\n") {
		if strings.HasPrefix(line, "kata_agent_") {
			t.Log(line)
		}
	}
}
