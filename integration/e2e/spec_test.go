// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/integration/lab"
)

// groupAnnotation puts containers into one pod, and so into one machine.
const groupAnnotation = "io.containerd.runc.v2.group"

// spec is an OCI specification under construction.
type spec struct{ specs.Spec }

// defaultCaps are those that containerd gives a container.
var defaultCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// newSpec is the specification that a container engine would write for a
// command of the busybox image, with cgroups visible.
func newSpec(t *testing.T, args ...string) *spec {
	t.Helper()
	caps := func() []string { return append([]string(nil), defaultCaps...) }
	mount := func(dst, typ string, opts ...string) specs.Mount {
		return specs.Mount{Destination: dst, Type: typ, Source: filepath.Base(dst), Options: opts}
	}
	return &spec{specs.Spec{
		Version: "1.1.0",
		Root:    &specs.Root{Path: rootfs(t)},
		Process: &specs.Process{
			Args: args, Cwd: "/", Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, NoNewPrivileges: true,
			Capabilities: &specs.LinuxCapabilities{Bounding: caps(), Effective: caps(), Permitted: caps()},
			Rlimits:      []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 1024, Soft: 1024}},
		},
		Mounts: []specs.Mount{
			mount("/proc", "proc", "nosuid", "noexec", "nodev"),
			mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
			mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
			mount("/dev/shm", "tmpfs", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),
			mount("/dev/mqueue", "mqueue", "nosuid", "noexec", "nodev"),
			mount("/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
			mount("/sys/fs/cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro"),
			mount("/run", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
		},
		Linux: &specs.Linux{
			CgroupsPath: "/e2e/container",
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
				{Type: specs.MountNamespace}, {Type: specs.NetworkNamespace},
			},
			Resources:     &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}},
			MaskedPaths:   []string{"/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware", "/proc/scsi"},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	}}
}

// group puts the container into the pod of another.
func (s *spec) group(id string) *spec {
	if s.Annotations == nil {
		s.Annotations = map[string]string{}
	}
	s.Annotations[groupAnnotation] = id
	return s
}

// mount adds a mount.
func (s *spec) mount(typ, src, dst string, options ...string) *spec {
	s.Mounts = append(s.Mounts, specs.Mount{Type: typ, Source: src, Destination: dst, Options: options})
	return s
}

// file writes the specification to a file of the test.
func (s *spec) file(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	s.write(t, filepath.Join(dir, "config.json"))
	return filepath.Join(dir, "config.json")
}

func (s *spec) write(t *testing.T, path string) {
	t.Helper()
	data, err := json.Marshal(s.Spec)
	if err == nil {
		err = os.WriteFile(path, data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

var rootfsOnce sync.Once

// rootfs is a directory with the content of the busybox image, for containers of
// a written specification. Those that write to it say so by names of their own.
func rootfs(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(workDir(t), "rootfs")
	rootfsOnce.Do(func() {
		if err := unpackBusybox(dir); err != nil {
			t.Fatal(err)
		}
	})
	return dir
}

// unpackBusybox unpacks the only layer of the lab's image.
func unpackBusybox(dir string) error {
	tar, err := lab.BusyboxTar()
	if err != nil {
		return err
	}
	type descriptor struct{ Digest string }
	var index struct{ Manifests []descriptor }
	var manifest struct{ Layers []descriptor }
	member := func(d descriptor) string { return "blobs/" + strings.ReplaceAll(d.Digest, ":", "/") }
	read := func(name string, v any) error {
		out, err := exec.Command("tar", "-xOf", tar, name).Output()
		if err != nil {
			return fmt.Errorf("%s of %s: %w", name, tar, err)
		}
		return json.Unmarshal(out, v)
	}
	if err := read("index.json", &index); err != nil {
		return err
	}
	if err := read(member(index.Manifests[0]), &manifest); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	out, err := exec.Command("sh", "-c", `tar -xOf "$0" "$1" | tar -x -p -C "$2"`, tar, member(manifest.Layers[0]), dir).CombinedOutput()
	if err != nil {
		return fmt.Errorf("unpack %s: %w: %s", tar, err, out)
	}
	return nil
}
