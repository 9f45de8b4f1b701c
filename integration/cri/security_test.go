// SPDX-License-Identifier: Apache-2.0

package cri

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestSecurity: what a security context asks for holds in the guest. All parts share a pod.
func TestSecurity(t *testing.T) { each(t, testSecurity, pauseMode, oldMode) }

func testSecurity(b *box) {
	p := b.run(func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext.SupplementalGroups = []int64{volumeGroup}
	})
	for _, part := range []struct {
		name string
		test func(*pod)
	}{
		{"Capabilities", testCapabilities},
		{"Escalation", testEscalation},
		{"Seccomp", testSeccomp},
		{"BadSeccomp", testBadSeccomp},
		{"ReadOnlyRoot", testReadOnlyRoot},
		{"FSGroup", testFSGroup},
		{"Paths", testPaths},
	} {
		b.Run(part.name, func(t *testing.T) { part.test(p.in(t)) })
	}
}

// secure is a container that runs a script with a security context of its own.
func (p *pod) secure(text string, change func(*runtimeapi.LinuxContainerSecurityContext)) *runtimeapi.ContainerConfig {
	config := p.script(text)
	change(config.Linux.SecurityContext)
	return config
}

// testCapabilities: the sets of the first process, and what the kernel makes of them.
func testCapabilities(p *pod) {
	const chown, kill, admin = 1 << unix.CAP_CHOWN, 1 << unix.CAP_KILL, 1 << unix.CAP_NET_ADMIN
	for _, c := range []struct {
		name      string
		add, drop []string
		has, not  uint64
	}{
		{"default", nil, nil, chown | kill, admin},
		{"added and dropped", []string{"NET_ADMIN"}, []string{"CHOWN"}, kill | admin, chown},
		{"all but one", []string{"KILL"}, []string{"ALL"}, kill, ^uint64(kill)},
	} {
		out := strings.Fields(p.output(p.secure("awk '/^Cap(Eff|Bnd)/{print $2}' /proc/self/status; touch /f; chown 1 /f 2>/dev/null; stat -c %u /f", func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Capabilities = &runtimeapi.Capability{AddCapabilities: c.add, DropCapabilities: c.drop}
		})))
		if len(out) != 3 {
			p.Fatalf("%s: %q", c.name, out)
		}
		for _, text := range out[:2] {
			set := must(strconv.ParseUint(text, 16, 64))(p)
			if set&c.has != c.has || set&c.not != 0 {
				p.Errorf("%s: the set is %#x; want all of %#x and none of %#x", c.name, set, c.has, c.not)
			}
		}
		if may := out[2] == "1"; may != (c.has&chown != 0) {
			p.Errorf("%s: chown works: %v", c.name, may)
		}
	}
}

// testEscalation: allowPrivilegeEscalation: false, which the kubelet calls no_new_privs.
func testEscalation(p *pod) {
	for _, want := range []string{"0", "1"} {
		got := p.output(p.secure("awk '/^NoNewPrivs/{print $2}' /proc/self/status", func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.NoNewPrivs = want == "1"
		}))
		if got != want+"\n" {
			p.Errorf("no_new_privs is %q; want %s", got, want)
		}
	}
}

// profile is a seccomp profile of the node.
func (p *pod) profile(content string) *runtimeapi.SecurityProfile {
	path := filepath.Join(p.TempDir(), "profile.json")
	p.ok(os.WriteFile(path, []byte(content), 0o600))
	return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: path}
}

func testSeccomp(p *pod) {
	// A new user namespace needs no capability, but the default profile forbids it.
	const text = "awk '/^Seccomp:/{print $2}' /proc/self/status; unshare -U true 2>/dev/null && echo namespace; mkdir /d 2>&1 && echo directory; true"
	for _, c := range []struct {
		name    string
		profile *runtimeapi.SecurityProfile
		want    string
	}{
		{"unconfined", &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}, "0\nnamespace\ndirectory\n"},
		{"default", &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}, "2\ndirectory\n"},
		{"localhost", p.profile(fmt.Sprintf(`{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": %d}]}`, syscall.ENOSPC)),
			"2\nnamespace\nmkdir: can't create directory '/d': No space left on device\n"},
	} {
		if got := p.output(p.secure(text, func(s *runtimeapi.LinuxContainerSecurityContext) { s.Seccomp = c.profile })); got != c.want {
			p.Errorf("%s: %q; want %q", c.name, got, c.want)
		}
	}
}

// testBadSeccomp: a profile that is no profile is an error that says so, whoever
// notices: containerd, which reads the file, or the shim, which gets what was in it.
func testBadSeccomp(p *pod) {
	for _, c := range []struct {
		content, want string
		code          codes.Code
	}{
		{`{"defaultAction": "SCMP_ACT_`, "seccomp", codes.Unknown}, // containerd's
		{`{"defaultAction": "SCMP_ACT_PERHAPS"}`, "SCMP_ACT_PERHAPS", codes.InvalidArgument},
		{`{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_ISH"}]}]}`, "SCMP_CMP_ISH", codes.InvalidArgument},
	} {
		config := p.secure("true", func(s *runtimeapi.LinuxContainerSecurityContext) { s.Seccomp = p.profile(c.content) })
		id, err := p.runtime.CreateContainer(p.ctx(), p.id, config, p.config)
		if err == nil { // the task is made now
			err = p.runtime.StartContainer(p.ctx(), id)
		}
		if err == nil || !strings.Contains(err.Error(), c.want) || status.Code(err) != c.code {
			p.Errorf("%s: %v; want an error of the kind %v that names %s", c.content, err, c.code, c.want)
		}
	}
}

func testReadOnlyRoot(p *pod) {
	config := p.secure("touch /f 2>&1; touch /tmp/f 2>&1; touch /dev/shm/f /data/f && rm /dev/shm/f && echo ok; touch /etc/hosts 2>&1; true", func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.ReadonlyRootfs = true
	})
	config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/data", HostPath: p.TempDir()}}
	want := ""
	for _, f := range []string{"/f", "/tmp/f"} {
		want += "touch: " + f + ": Read-only file system\n"
	}
	if got := p.output(config); got != want+"ok\ntouch: /etc/hosts: Read-only file system\n" {
		p.Errorf("got %q", got)
	}
}

// volumeGroup is a pod's fsGroup: the kubelet gives volumes to it, and it to the
// containers as a supplemental group.
const volumeGroup = 2000

// testFSGroup: what the kubelet makes of a volume with an fsGroup.
func testFSGroup(p *pod) {
	volume := filepath.Join(p.TempDir(), "volume")
	old := filepath.Join(volume, "old")
	p.ok(os.Mkdir(volume, 0))
	p.ok(os.WriteFile(old, []byte("old\n"), 0))
	for _, path := range []string{volume, old} {
		p.ok(os.Chown(path, 0, volumeGroup))
	}
	p.ok(os.Chmod(volume, 0o770|os.ModeSetgid))
	p.ok(os.Chmod(old, 0o660))
	config := p.secure("id -u; id -g; id -G; cat /volume/old; echo new >>/volume/old; echo x >/volume/new; stat -c '%u %g' /volume/new", func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.RunAsUser = &runtimeapi.Int64Value{Value: 1234}
		s.RunAsGroup = &runtimeapi.Int64Value{Value: 1235}
		s.SupplementalGroups = []int64{volumeGroup, 3000}
	})
	config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/volume", HostPath: volume}}
	if got := p.output(config); got != "1234\n1235\n1235 2000 3000\nold\n1234 2000\n" {
		p.Errorf("got %q", got)
	}
	if got := must(os.ReadFile(old))(p); string(got) != "old\nnew\n" {
		p.Errorf("on the host the file reads %q", got)
	}
	info := must(os.Stat(filepath.Join(volume, "new")))(p)
	if st := info.Sys().(*syscall.Stat_t); st.Uid != 1234 || st.Gid != volumeGroup {
		p.Errorf("on the host the new file belongs to %d:%d", st.Uid, st.Gid)
	}
}

// testPaths: what the kubelet wants masked and read-only (procMount: Default).
func testPaths(p *pod) {
	config := p.secure("head -c 10 /proc/kcore 2>/dev/null | wc -c; echo 1 >/proc/sys/kernel/msgmax; true", func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.MaskedPaths = []string{"/proc/kcore", "/proc/no-such-file"}
		s.ReadonlyPaths = []string{"/proc/sys"}
	})
	if got := p.output(config); !strings.HasPrefix(got, "0\n") || !strings.Contains(got, "Read-only file system") {
		p.Errorf("got %q", got)
	}
}

// TestPrivileged: a privileged container may do anything in the guest and sees
// nothing of the host.
func TestPrivileged(t *testing.T) { each(t, testPrivileged) }

func testPrivileged(b *box) {
	p := b.run(func(c *runtimeapi.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	const disks = "ls /sys/class/block"
	before := p.sleeper().shell(disks)
	privileged := func(s *runtimeapi.LinuxContainerSecurityContext) { s.Privileged = true }
	got := strings.Fields(p.output(p.secure("mount -t tmpfs mine /mnt && touch /mnt/f && echo mounted; awk '/^CapEff/{print $2}' /proc/self/status; "+
		"echo 9001 >/proc/sys/kernel/msgmax && cat /proc/sys/kernel/msgmax; ip link set lo down && ip link set lo up && echo link; find /dev -type b", privileged)))
	if len(got) != 4 || got[0] != "mounted" || got[2] != "9001" || got[3] != "link" {
		b.Errorf("got %q", got)
	} else if set := must(strconv.ParseUint(got[1], 16, 64))(b); set&(1<<unix.CAP_SYS_ADMIN|1<<unix.CAP_SYS_MODULE) == 0 {
		b.Errorf("capabilities %#x", set)
	}
	testHostDevices(p, privileged)
	if got := p.sleeper().shell(disks); got != before {
		b.Errorf("the guest's block devices were\n%s\nand are\n%s", before, got)
	}
}

// testHostDevices: a container that lists every device of the host is refused
// with the name of a block device: none is attached that is not a volume of the pod.
func testHostDevices(p *pod, privileged func(*runtimeapi.LinuxContainerSecurityContext)) {
	config := p.secure("true", privileged)
	var blocks []string
	p.ok(filepath.WalkDir("/dev", func(path string, d os.DirEntry, err error) error {
		if err != nil || d.Type()&os.ModeDevice == 0 {
			return nil //nolint:nilerr // what cannot be read is not listed
		}
		if d.Type()&os.ModeCharDevice == 0 {
			blocks = append(blocks, path)
		}
		config.Devices = append(config.Devices, &runtimeapi.Device{ContainerPath: path, HostPath: path, Permissions: "rwm"})
		return nil
	}))
	if len(blocks) == 0 { // a node of a number for local use, which nobody opens (devices.txt)
		node := filepath.Join(p.TempDir(), "block")
		p.ok(unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(240, 7))))
		blocks = []string{node}
		config.Devices = append(config.Devices, &runtimeapi.Device{ContainerPath: node, HostPath: node, Permissions: "rwm"})
	}
	id, err := p.runtime.CreateContainer(p.ctx(), p.id, config, p.config)
	if err == nil { // the task is made now
		err = p.runtime.StartContainer(p.ctx(), id)
	}
	if err == nil || !slices.ContainsFunc(blocks, func(path string) bool {
		return strings.Contains(err.Error(), path+")") || strings.Contains(err.Error(), path+":")
	}) {
		p.Errorf("a container with the host's block devices %q: %v; want a refusal that names one", blocks, err)
	}
}
