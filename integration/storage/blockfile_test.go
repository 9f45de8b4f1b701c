// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"strings"
	"testing"

	"github.com/kata-v2/kata/integration/lab"
)

// TestBlockfile: the ext4 that a blockfile snapshot is becomes the container's disk
// as it is, which bounds what is written; what one container wrote another does not see.
func TestBlockfile(t *testing.T) {
	testBlockfile(openBox(t, "blockfile", lab.Options{Snapshotter: "blockfile"}), "ext4")
}

// TestBlockfileXFS: the same with XFS, whose copies all have one UUID. Debian's
// cloud kernel has it as a module that is not in the guest's image: there the error says so.
func TestBlockfileXFS(t *testing.T) {
	b := openBox(t, "xfs", lab.Options{Snapshotter: "blockfile", BlockfileType: "xfs"})
	if !newKernel(b) {
		r := b.ctr(b.runArgs(lab.BusyboxImage, "noxfs", []string{"--rm"}, "true")...)
		if r.Code == 0 || !strings.Contains(r.Stderr, "the guest's kernel has no file system xfs") {
			t.Errorf("got %+v; want an error that names the file system", r)
		}
		b.remove("noxfs")
		return
	}
	testBlockfile(b, "xfs")
}

func testBlockfile(b *box, fstype string) {
	t := b.T
	member := []string{"--annotation", "io.containerd.runc.v2.group=file"}
	b.start(lab.BusyboxImage, "file", member...)
	want(t, "disks", b.disks("file"), "disk0 0")
	if root, _, _ := strings.Cut(b.shell("file", "cat /proc/mounts"), "\n"); !strings.HasPrefix(root, "/dev/vda / "+fstype+" rw") {
		t.Errorf("root: %s; want the disk itself", root)
	}
	if line := b.rootLog("file"); !strings.Contains(line, "path=block") || !strings.Contains(line, fstype) {
		t.Errorf("logged: %s", line)
	}
	r := b.ctr("tasks", "exec", "--exec-id", "fill", "--fifo-dir", b.c.FIFODir(), "file", "dd", "if=/dev/zero", "of=/fill", "bs=1M", "count=64")
	if r.Code == 0 || !strings.Contains(r.Stderr, "No space left on device") {
		t.Errorf("more than fits was written: %+v", r)
	}
	second := b.ctr(b.runArgs(lab.BusyboxImage, "file2", append([]string{"--rm"}, member...), "sh", "-c", "test -e /fill || echo apart; echo x >/new && cat /new")...)
	if second.Code != 0 || second.Stdout != "apart\nx\n" {
		t.Errorf("a second container: %+v", second)
	}
	want(t, "disks when it is gone", b.disks("file"), "disk0 0")
	if all := strings.Join(b.processes("file"), "\n"); strings.Contains(all, "virtiofsd") {
		t.Errorf("a virtio-fs daemon:\n%s", all)
	}
	b.remove("file")
}
