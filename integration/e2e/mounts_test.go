// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func writeFile(t *testing.T, content string, elements ...string) string {
	t.Helper()
	path := filepath.Join(elements...)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	}
	return string(data)
}

// testMounts: directories of the host, writable and not, live both ways; tmpfs
// of the guest with its size.
func testMounts(b *box) {
	rw, ro := b.TempDir(), b.TempDir()
	writeFile(b.T, "from the host", rw, "sub", "there")
	writeFile(b.T, "fixed", ro, "there")
	s := member(b.T, "sleep", "1000").
		mount("bind", rw, "/rw", "rbind", "rw").
		mount("bind", ro, "/ro", "rbind", "ro").
		mount("tmpfs", "tmpfs", "/t", "nosuid", "noexec", "mode=700", "size=1m")
	b.startSpec("mounts", s)
	if got := b.shell("mounts", "cat /rw/sub/there /ro/there"); got != "from the hostfixed" {
		b.Errorf("the container reads %q", got)
	}
	b.shell("mounts", "echo from the guest >/rw/new; mkdir /rw/dir; rm -r /rw/sub; chmod 750 /rw/dir")
	if got := readFile(b.T, filepath.Join(rw, "new")); got != "from the guest\n" {
		b.Errorf("the host reads %q", got)
	}
	if st, err := os.Stat(filepath.Join(rw, "dir")); err != nil || st.Mode().Perm() != 0o750 {
		b.Errorf("the directory made by the guest: %v, %v", st, err)
	}
	if _, err := os.Stat(filepath.Join(rw, "sub")); !os.IsNotExist(err) {
		b.Errorf("what the guest removed is there: %v", err)
	}
	writeFile(b.T, "later", rw, "later")
	if got := b.shell("mounts", "cat /rw/later"); got != "later" {
		b.Errorf("a file that the host made later reads %q", got)
	}
	if r := b.exec("mounts", "sh", "-c", "echo x >/ro/there"); r.Code == 0 || !strings.Contains(r.Stderr, "Read-only") {
		b.Errorf("write to a read-only mount: %+v", r)
	}
	if r := b.exec("mounts", "sh", "-c", "mount -o remount,rw /ro; echo x >/ro/there"); r.Code == 0 || readFile(b.T, filepath.Join(ro, "there")) != "fixed" {
		b.Errorf("the read-only mount was written after a remount: %+v", r)
	}
	if got := b.shell("mounts", "stat -c %a /t; grep ' /t ' /proc/mounts"); !strings.HasPrefix(got, "700\n") || !strings.Contains(got, "noexec") || !strings.Contains(got, "size=1024k") {
		b.Errorf("tmpfs: %s", got)
	}
	if r := b.exec("mounts", "sh", "-c", "head -c 2000000 /dev/zero >/t/big"); r.Code == 0 {
		b.Error("2 MB went into a tmpfs of 1 MiB")
	}
	b.remove("mounts")
}

// testFileMounts: single files, as an engine brings resolv.conf, hosts and
// hostname; one file in the root filesystem's place of another.
func testFileMounts(b *box) {
	dir := b.TempDir()
	s := member(b.T, "sleep", "1000").
		mount("bind", writeFile(b.T, "nameserver 192.0.2.1\n", dir, "resolv.conf"), "/etc/resolv.conf", "rbind", "ro").
		mount("bind", writeFile(b.T, "192.0.2.7 seven\n", dir, "hosts"), "/etc/hosts", "rbind", "rw").
		mount("bind", writeFile(b.T, "from-a-file\n", dir, "hostname"), "/etc/hostname", "rbind", "ro").
		mount("bind", writeFile(b.T, "root:x:0:0::/:/bin/sh\n", dir, "passwd"), "/etc/passwd", "bind", "ro")
	s.Hostname = "seven"
	b.startSpec("files", s)
	want := "nameserver 192.0.2.1\n192.0.2.7 seven\nfrom-a-file\nroot:x:0:0::/:/bin/sh\nseven"
	if got := b.shell("files", "cat /etc/resolv.conf /etc/hosts /etc/hostname /etc/passwd; hostname"); got != want {
		b.Errorf("files read %q, want %q", got, want)
	}
	b.shell("files", "echo 192.0.2.8 eight >>/etc/hosts")
	if got := readFile(b.T, filepath.Join(dir, "hosts")); got != "192.0.2.7 seven\n192.0.2.8 eight\n" {
		b.Errorf("the host reads %q", got)
	}
	if r := b.exec("files", "sh", "-c", "echo x >>/etc/resolv.conf"); r.Code == 0 {
		b.Error("a file mounted read-only was written")
	}
	b.remove("files")
}

// testShm: /dev/shm is memory of the guest, with the size that was asked for, or the pod's.
func testShm(b *box) {
	own := script(b.T, "grep ' /dev/shm ' /proc/mounts; echo x >/dev/shm/x && cat /dev/shm/x")
	if r := b.runSpec("shm", own); r.Code != 0 || !strings.Contains(r.Stdout, "tmpfs") || !strings.Contains(r.Stdout, "size=65536k") || !strings.HasSuffix(r.Stdout, "x\n") {
		b.Errorf("own: %+v", r)
	}
	// An engine that gives all containers of a pod one /dev/shm binds a directory of the host.
	shared := script(b.T, "grep ' /dev/shm ' /proc/mounts; echo x >/dev/shm/x && cat /dev/shm/x")
	for i, m := range shared.Mounts {
		if m.Destination == "/dev/shm" {
			shared.Mounts[i].Type, shared.Mounts[i].Source, shared.Mounts[i].Options = "bind", b.TempDir(), []string{"rbind", "rw"}
		}
	}
	if r := b.runSpec("shm", shared); r.Code != 0 || !strings.Contains(r.Stdout, "tmpfs") || !strings.HasSuffix(r.Stdout, "x\n") {
		b.Errorf("the pod's: %+v", r)
	}
}

// testReadOnlyRoot: the root filesystem takes no write, mounts in it do.
func testReadOnlyRoot(b *box) {
	s := script(b.T, "touch /x; echo $?; touch /run/x; echo $?; mount -o remount,rw /; touch /x; echo $?")
	s.Root.Readonly = true
	if r := b.runSpec("readonly", s); r.Stdout != "1\n0\n1\n" || !strings.Contains(r.Stderr, "Read-only") {
		b.Errorf("got %+v; want the first and last refused", r)
	}
	if _, err := os.Stat(filepath.Join(rootfs(b.T), "x")); !os.IsNotExist(err) {
		b.Errorf("the file is on the host: %v", err)
	}
	r := b.run("readonly2", []string{"--read-only", "--annotation", groupAnnotation + "=" + podID}, "touch", "/x")
	if r.Code != 1 || !strings.Contains(r.Stderr, "Read-only") {
		b.Errorf("ctr run --read-only: %+v", r)
	}
}
