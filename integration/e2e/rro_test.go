// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// testRecursiveReadOnly: a read-only directory of the host is read-only all the
// way down, whatever is mounted below it and whatever the container may do in the
// guest; that is what the shim claims by the mount option rro. A writable one is not.
func testRecursiveReadOnly(b *box) {
	dir := hostTree(b.T)
	s := member(b.T, "sleep", "1000").
		mount("bind", dir, "/rro", "rbind", "rro").
		mount("bind", dir, "/ro", "rbind", "ro").
		mount("bind", dir, "/rw", "rbind", "rw")
	caps := s.Process.Capabilities
	for _, set := range []*[]string{&caps.Bounding, &caps.Effective, &caps.Permitted} {
		*set = append(*set, "CAP_SYS_ADMIN")
	}
	b.startSpec("rro", s)
	for _, at := range []string{"/rro", "/rro/sub", "/ro", "/ro/sub"} {
		if got := b.shell("rro", "cat "+at+"/there"); got != "text" {
			b.Errorf("%s/there reads %q", at, got)
		}
		for _, first := range []string{"", "mount -o remount,bind,rw " + at + " && "} {
			if r := b.exec("rro", "sh", "-c", first+"echo x >"+at+"/new"); r.Code == 0 || !strings.Contains(r.Stderr, "Read-only file system") {
				b.Errorf("%swrite below %s: %+v; want a read-only file system", first, at, r)
			}
		}
	}
	b.shell("rro", "echo x >/rw/new; echo x >/rw/sub/new")
	b.remove("rro")
}

// hostTree is a directory with another file system mounted below it.
func hostTree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	writeFile(t, "text", dir, "there")
	sub := filepath.Join(dir, "sub")
	if err := unix.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", sub, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(sub, 0); err != nil {
			t.Error(err)
		}
	})
	writeFile(t, "text", sub, "there")
	return dir
}
