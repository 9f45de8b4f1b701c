// SPDX-License-Identifier: Apache-2.0

package cri

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/kata-v2/kata/integration/lab"
)

// TestSharing: what the containers of a pod have in common and what not.
func TestSharing(t *testing.T) {
	each(t, func(b *box) {
		p := b.run(func(c *runtimeapi.PodSandboxConfig) {
			c.DnsConfig = &runtimeapi.DNSConfig{Servers: []string{"192.0.2.53"}, Searches: []string{"ns.svc.cluster.local"}, Options: []string{"ndots:5"}}
			c.Linux.Sysctls = map[string]string{"net.core.somaxconn": "77", "kernel.shm_rmid_forced": "1"}
		})
		for _, part := range []struct {
			name string
			test func(*pod)
		}{
			{"Names", testNames},
			{"Network", testLocalhost},
			{"IPC", testIPC},
			{"Shm", testShm},
			{"Sysctls", testSysctls},
			{"OwnProcesses", testOwnProcesses},
			{"Crash", testCrash},
			{"Stats", testStats},
			{"Metrics", testMetrics},
		} {
			b.Run(part.name, func(t *testing.T) { part.test(p.in(t)) })
		}
	}, pauseMode)
}

// testNames: hostname, /etc/hostname, /etc/hosts, /etc/resolv.conf.
func testNames(p *pod) {
	c := p.sleeper()
	if got := c.shell("hostname; cat /etc/hostname"); got != p.config.Hostname+"\n"+p.config.Hostname {
		p.Errorf("names %q", got)
	}
	if got := c.shell("cat /etc/resolv.conf"); got != "search ns.svc.cluster.local\nnameserver 192.0.2.53\noptions ndots:5" {
		p.Errorf("resolv.conf %q", got)
	}
	if got := c.shell("cat /etc/hosts"); !strings.Contains(got, "localhost") {
		p.Errorf("hosts %q", got)
	}
	// The kubelet brings a hosts file of its own.
	hosts := filepath.Join(p.TempDir(), "hosts")
	p.ok(os.WriteFile(hosts, []byte("192.0.2.7 seven\n"), 0o644))
	config := p.script("cat /etc/hosts")
	config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/etc/hosts", HostPath: hosts}}
	if got := p.output(config); got != "192.0.2.7 seven\n" {
		p.Errorf("a mounted hosts file reads %q", got)
	}
}

// testLocalhost: one container serves, another asks it at 127.0.0.1.
func testLocalhost(p *pod) {
	server := p.start(p.script("mkdir /www; echo hello >/www/index.html; exec httpd -f -p 8000 -h /www"))
	client := p.sleeper()
	if got := client.shell("for i in 1 2 3 4 5 6 7 8 9 10; do wget -q -O - http://127.0.0.1:8000/ && exit; sleep 0.2; done; exit 1"); got != "hello" {
		p.Errorf("got %q", got)
	}
	if a, b := server.shell("readlink /proc/self/ns/net"), client.shell("readlink /proc/self/ns/net"); a != b {
		p.Errorf("network namespaces %s and %s", a, b)
	}
}

func testIPC(p *pod) {
	one, two := p.sleeper(), p.sleeper()
	for _, ns := range []string{"ipc", "uts"} {
		if a, b := one.shell("readlink /proc/self/ns/"+ns), two.shell("readlink /proc/self/ns/"+ns); a != b {
			p.Errorf("%s namespaces %s and %s", ns, a, b)
		}
	}
	if a, b := one.shell("readlink /proc/self/ns/mnt"), two.shell("readlink /proc/self/ns/mnt"); a == b {
		p.Errorf("both are in the mount namespace %s", a)
	}
}

func testShm(p *pod) {
	one, two := p.sleeper(), p.sleeper()
	one.shell("echo shared >/dev/shm/x")
	if got := two.shell("cat /dev/shm/x"); got != "shared" {
		p.Errorf("the other reads %q", got)
	}
	if got := two.shell("df -k /dev/shm | awk 'NR==2{print $2}'; stat -c %a /dev/shm"); got != "65536\n1777" {
		p.Errorf("size in KiB and mode: %q", got)
	}
	if got := two.shell("awk '$2==\"/dev/shm\"{print $4}' /proc/mounts"); !strings.HasPrefix(got, "rw,nosuid,nodev,noexec,") {
		p.Errorf("mounted with %q", got)
	}
}

func testSysctls(p *pod) {
	c := p.sleeper()
	for name, want := range map[string]string{
		"net/core/somaxconn": "77", "kernel/shm_rmid_forced": "1", "net/ipv4/ip_unprivileged_port_start": "0",
	} {
		if got := c.shell("cat /proc/sys/" + name); got != want {
			p.Errorf("%s is %q; want %s", name, got, want)
		}
	}
}

// testOwnProcesses: without shareProcessNamespace each container has its own.
func testOwnProcesses(p *pod) {
	one := p.start(p.containerConfig("sleep", "4242"))
	two := p.start(p.containerConfig("sleep", "5353"))
	if ps := one.shell("ps -o pid,args"); strings.Contains(ps, "5353") || !strings.Contains(ps, "1 sleep 4242") {
		p.Errorf("one sees\n%s", ps)
	}
	if ps := two.shell("ps -o pid,args"); strings.Contains(ps, "4242") || !strings.Contains(ps, "1 sleep 5353") {
		p.Errorf("two sees\n%s", ps)
	}
}

// testCrash: a container that crashes or runs out of memory leaves the others alone.
func testCrash(p *pod) {
	witness := p.sleeper()
	boot := witness.shell("cat /proc/sys/kernel/random/boot_id")
	c := p.start(p.script("sleep 0.3; exit 9"))
	if s := c.wait(); s.ExitCode != 9 {
		p.Errorf("exit code %d", s.ExitCode)
	}
	config := p.script("tail /dev/zero")
	config.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 16 << 20}
	hungry := p.start(config)
	if s := hungry.wait(); s.ExitCode != 137 || s.Reason != "OOMKilled" {
		p.Errorf("out of memory: exit code %d, reason %s", s.ExitCode, s.Reason)
	}
	if s := c.status(); s.Reason != "Error" {
		p.Errorf("the other's reason is %s", s.Reason)
	}
	if got := witness.shell("cat /proc/sys/kernel/random/boot_id"); got != boot {
		p.Error("the machine is another one")
	}
	if p.state() != runtimeapi.PodSandboxState_SANDBOX_READY {
		p.Error("the pod is not ready")
	}
}

func testStats(p *pod) {
	c := p.start(p.script("head -c 4000000 /dev/zero >/dev/shm/fill; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo ready; sleep 1000"))
	c.awaitLog("ready\n")
	s := must(p.runtime.ContainerStats(p.ctx(), c.id))(p)
	if s.Attributes.Id != c.id || s.Cpu.GetUsageCoreNanoSeconds().GetValue() == 0 || s.Memory.GetWorkingSetBytes().GetValue() < 2<<20 {
		p.Errorf("container: %v", s)
	}
	if p.mode.handler == lab.HandlerPause || p.mode.version < "2.4" {
		return // the figures of such a pod are those of its cgroup on the host, not of the shim
	}
	ps := must(p.runtime.PodSandboxStats(p.ctx(), p.id))(p)
	if ps.Attributes.Id != p.id || len(ps.Linux.Containers) == 0 || ps.Linux.Process.GetProcessCount().GetValue() == 0 ||
		ps.Linux.Network.GetDefaultInterface().GetName() != "eth0" {
		p.Errorf("pod: %v", ps)
	}
	if cpu, mem := ps.Linux.Cpu.GetUsageCoreNanoSeconds().GetValue(), ps.Linux.Memory.GetWorkingSetBytes().GetValue(); cpu < s.Cpu.UsageCoreNanoSeconds.Value || mem < 2<<20 {
		p.Errorf("pod: cpu %d ns, memory %d", cpu, mem)
	}
}

// TestSharedProcesses: with shareProcessNamespace the containers see each other's
// processes, none is the namespace's first, and each ends for itself.
func TestSharedProcesses(t *testing.T) { each(t, testSharedProcesses, pauseMode, oldMode) }

func testSharedProcesses(b *box) {
	p := b.run(func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	})
	one := p.start(p.containerConfig("sleep", "4242"))
	two := p.start(p.script("trap 'exit 0' TERM; (sleep 5353 & exec sleep 5354) & while :; do sleep 0.1; done"))
	three := p.start(p.containerConfig("sleep", "6464"))
	ps := two.shell("ps -o pid,args")
	for _, want := range []string{"sleep 4242", "sleep 5353", "sleep 6464"} {
		if !strings.Contains(ps, want) {
			b.Errorf("%q is not seen:\n%s", want, ps)
		}
	}
	if strings.Contains(ps, " 1 sleep") || strings.Contains(ps, " 1 sh -c trap 'exit 0' TERM; (sleep") {
		b.Errorf("a container is the namespace's init:\n%s", ps)
	}
	if got := two.shell("ls /proc/1/root/run/kata-containers /proc/1/root/init 2>/dev/null || echo none"); got != "none" {
		b.Errorf("the init's root file system shows %q", got)
	}
	// The first one ends: the rest goes on.
	one.stop(0)
	one.removeNow()
	if ps := three.shell("ps -o args"); strings.Contains(ps, "4242") || !strings.Contains(ps, "5353") {
		b.Errorf("after the end of the first:\n%s", ps)
	}
	// All of a container's processes end with it, and nobody else's.
	two.stop(5)
	if s := two.status(); s.ExitCode != 0 {
		b.Errorf("exit code %d", s.ExitCode)
	}
	two.removeNow()
	if ps := three.shell("ps -o args"); strings.Contains(ps, "535") || !strings.Contains(ps, "6464") {
		b.Errorf("after the end of the second:\n%s", ps)
	}
	four := p.sleeper()
	if ps := four.shell("ps -o args"); !strings.Contains(ps, "6464") {
		b.Errorf("a later container sees\n%s", ps)
	}
	// Orphans are reaped.
	four.shell("(sleep 0.1 & exec true) & sleep 0.5")
	if ps := four.shell("ps -o stat,args | grep '^Z' || echo none"); ps != "none" {
		b.Errorf("zombies: %s", ps)
	}
}

// testMetrics: what the kubelet shows at /metrics/cadvisor, which containerd 2.4 makes
// of the shim's figures and of the pod's network.
func testMetrics(p *pod) {
	if p.mode.version < "2.4" {
		return // older ones do not implement it, or not for all pods
	}
	c := p.start(p.script("head -c 4000000 /dev/zero >/dev/shm/more; echo ready; exec sleep 1000"))
	c.awaitLog("ready\n")
	c.shell("ping -c 1 -W 10 " + gateway)
	if all := must(p.runtime.ListMetricDescriptors(p.ctx()))(p); len(all) == 0 {
		p.Error("no metric is described")
	}
	var mine *runtimeapi.PodSandboxMetrics
	for _, m := range must(p.runtime.ListPodSandboxMetrics(p.ctx()))(p) {
		if m.PodSandboxId == p.id {
			mine = m
		}
	}
	values := func(list []*runtimeapi.Metric) map[string]uint64 {
		out := map[string]uint64{}
		for _, m := range list {
			out[m.Name] = max(out[m.Name], m.GetValue().GetValue())
		}
		return out
	}
	pod := values(mine.GetMetrics())
	if pod["container_network_receive_bytes_total"] == 0 {
		p.Errorf("the pod's: %v", pod)
	}
	for _, m := range mine.GetContainerMetrics() {
		if m.ContainerId != c.id {
			continue
		}
		got := values(m.Metrics)
		for name, least := range map[string]uint64{"container_memory_usage_bytes": 2 << 20, "container_processes": 1, "container_start_time_seconds": 1 << 30} {
			if got[name] < least {
				p.Errorf("%s is %d; want at least %d", name, got[name], least)
			}
		}
		return
	}
	p.Errorf("no metrics of the container in %v", mine)
}
