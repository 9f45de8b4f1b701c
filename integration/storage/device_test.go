// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kata-v2/kata/integration/lab"
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

// TestBusyDevice: a device that is mounted on the host is refused by name.
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
}
