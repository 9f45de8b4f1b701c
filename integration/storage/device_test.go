// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/integration/lab"
	rootfs "github.com/kata-v2/kata/sandbox/storage"
)

// loop makes a block device of a file that begins with text.
func loop(t *testing.T, text string) (dev, file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "disk")
	data := make([]byte, 4<<20)
	copy(data, text)
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	dev = command(t, "losetup", "--find", "--show", file)
	t.Cleanup(func() { command(t, "losetup", "--detach", dev) })
	return dev, file
}

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// TestBlockDevice: a block device of the specification is a device of the
// container, with the guest's number, that containers of the pod share; so is a
// bind mount of one, read-only if asked.
func TestBlockDevice(t *testing.T) {
	b := openBox(t, "quota", quota())
	dev, file := loop(t, "from the host")
	ro, _ := loop(t, "only to read")
	b.start(lab.BusyboxImage, "dev", "--annotation", "io.containerd.runc.v2.group=dev", "--device", dev, "--mount", "type=bind,src="+ro+",dst=/dev/ro,options=rbind:ro")
	want(t, "disks", b.disks("dev"), "disk0 1\ndisk1 0\ndisk2 0\ndisk3 1")
	script := `set -e; test -b ` + dev + `; head -c 13 ` + dev + `; echo; head -c 12 /dev/ro; echo
		name=$(grep -l disk2 /sys/block/vd*/serial | cut -d/ -f4); test $(stat -c %t:%T ` + dev + `) = $(printf %x:%x $(tr : ' ' </sys/block/$name/dev))
		echo x 2>/dev/null >/dev/ro && echo written; printf guest | dd of=` + dev + ` conv=notrunc,fsync 2>/dev/null; sync; echo done`
	want(t, "in the container", b.shell("dev", strings.ReplaceAll(script, "&& echo written;", "&& echo written || true;")), "from the host\nonly to read\ndone")
	second := b.ctr(b.runArgs(lab.BusyboxImage, "dev2", []string{"--rm", "--annotation", "io.containerd.runc.v2.group=dev", "--device", dev}, "head", "-c", "5", dev)...)
	if second.Code != 0 || second.Stdout != "guest" {
		t.Errorf("a second container of the pod: %+v", second)
	}
	b.remove("dev")
	data, err := os.ReadFile(file)
	if err != nil || !bytes.HasPrefix(data, []byte("guestthe host")) {
		t.Errorf("the device's file begins with %q, %v", data[:20], err)
	}
}

// TestBusyDevice: a device that is mounted on the host is refused by name, as a
// device of the specification and as a root filesystem.
func TestBusyDevice(t *testing.T) {
	b := openBox(t, "quota", quota())
	dev, _ := loop(t, "")
	command(t, "mkfs.ext4", "-q", dev)
	dir := t.TempDir()
	command(t, "mount", dev, dir)
	t.Cleanup(func() { command(t, "umount", dir) })
	r := b.ctr(b.runArgs(lab.BusyboxImage, "busy", []string{"--rm", "--device", dev}, "true")...)
	if r.Code == 0 || !strings.Contains(r.Stderr, "linux.devices[0] ("+dev+")") || !strings.Contains(r.Stderr, "mounted or in use") {
		t.Errorf("got %+v; want an error that names the device", r)
	}
	b.remove("busy")
	root := &rootfs.Root{Upper: &rootfs.Layer{Type: "ext4", Source: dev}}
	if _, err := root.Open(rootfs.NewDisks()); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "rootfs: disk "+dev+": it is mounted or in use") {
		t.Errorf("as a root filesystem: %v; want an error that names the device", err)
	}
}

// TestMountedDevice: a file system on a block device that the host has mounted
// read-only is a disk of the machine for a container that only reads it; one that
// the host may write to is shared, and so are both where disks are not wanted.
func TestMountedDevice(t *testing.T) {
	b := openBox(t, "quota", quota())
	dirs, devs := map[string]string{}, map[string]string{}
	for _, how := range []string{"ro", "rw"} {
		dev, _ := loop(t, "")
		dir := t.TempDir()
		command(t, "mkfs.ext4", "-q", dev)
		command(t, "mount", dev, dir)
		t.Cleanup(func() { command(t, "umount", dir) })
		b.must(os.WriteFile(filepath.Join(dir, "file"), []byte("of "+how), 0o644))
		command(t, "mount", "-o", "remount,"+how, dir)
		dirs[how], devs[how] = dir, dev
	}
	volume := func(how string) []string {
		return []string{"--mount", "type=bind,src=" + dirs[how] + ",dst=/" + how + ",options=rbind:rprivate:ro"}
	}
	const (
		look = "cat /ro/file; grep ' /ro ' /proc/mounts | cut -d' ' -f3,4; echo x 2>/dev/null >/ro/new || echo refused"
		root = "disk0 1\ndisk1 0"
	)
	b.start(lab.BusyboxImage, "mounted", append(volume("ro"), "--annotation", "io.containerd.runc.v2.group=mounted")...)
	want(t, "disks", b.disks("mounted"), root+"\ndisk2 1")
	if got := b.shell("mounted", look); !strings.HasPrefix(got, "of roext4 ro,") || !strings.HasSuffix(got, "\nrefused") {
		t.Errorf("the volume on a disk: %q", got)
	}
	if all := strings.Join(b.processes("mounted"), "\n"); strings.Contains(all, "virtiofsd") {
		t.Errorf("a virtio-fs daemon:\n%s", all)
	}
	member := append(append([]string{"--rm", "--annotation", "io.containerd.runc.v2.group=mounted"}, volume("ro")...), volume("rw")...)
	r := b.ctr(b.runArgs(lab.BusyboxImage, "mounted2", member, "sh", "-c", look+"; cat /rw/file; grep ' /rw ' /proc/mounts | cut -d' ' -f3")...)
	if r.Code != 0 || !strings.HasPrefix(r.Stdout, "of roext4 ro,") || !strings.HasSuffix(r.Stdout, "\nrefused\nof rwvirtiofs\n") {
		t.Errorf("a second container: %+v", r)
	}
	busy := []string{"--rm", "--annotation", "io.containerd.runc.v2.group=mounted", "--device", devs["rw"]}
	r = b.ctr(b.runArgs(lab.BusyboxImage, "busy", busy, "true")...)
	if r.Code == 0 || !strings.Contains(r.Stderr, "linux.devices[0] ("+devs["rw"]+")") || !strings.Contains(r.Stderr, "mounted or in use") {
		t.Errorf("a device that the host writes to: %+v; want an error that names it", r)
	}
	want(t, "disks when both are gone", b.disks("mounted"), root+"\ndisk2 1")
	b.remove("mounted")

	b = openBox(t, "shared", sharedLayers())
	r = b.ctr(b.runArgs(lab.BusyboxImage, "nodisk", append([]string{"--rm"}, volume("ro")...), "sh", "-c", look+"; ls /sys/block | grep -c vd; echo x >/new && cat /new")...)
	if r.Code != 0 || !strings.HasPrefix(r.Stdout, "of rovirtiofs ro,") || !strings.HasSuffix(r.Stdout, "\nrefused\n0\nx\n") {
		t.Errorf("with disable_block_device_use: %+v", r)
	}
	if line := b.rootLog("nodisk"); !strings.Contains(line, "path=virtio-fs") {
		t.Errorf("logged: %s", line)
	}
	for how, dir := range dirs {
		if got, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(got) != "of "+how {
			t.Errorf("on the host: %q, %v", got, err)
		}
	}
}

// sharedLayers is a lab whose EROFS layers are mounted on the host, after the shim
// has started, and shared with the guest.
func sharedLayers() lab.Options {
	return lab.Options{Snapshotter: "erofs", Kata: &lab.Kata{Set: map[string]string{"hypervisor.qemu.disable_block_device_use": "true"}}}
}
