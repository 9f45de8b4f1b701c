// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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

// testMountPoints: a mount reaches its place through links of the image that lead to
// nothing, also into a tmpfs; directories are made as on any host, a tmpfs has the
// mode of what it covers, and what is mounted in the container may need a module.
func testMountPoints(b *box) {
	root, dir := b.TempDir(), b.TempDir()
	if err := errors.Join(os.CopyFS(root, os.DirFS(rootfs(b.T))), os.Chmod(filepath.Join(root, "root"), 0o700),
		os.RemoveAll(filepath.Join(root, "etc", "resolv.conf")), // of another test
		os.Symlink("../run/systemd/resolve/stub-resolv.conf", filepath.Join(root, "etc", "resolv.conf")),
		os.Symlink("../../../nowhere/at/all", filepath.Join(root, "dangling"))); err != nil {
		b.Fatal(err)
	}
	writeFile(b.T, "there\n", dir, "file")
	s := script(b.T, `cat /etc/resolv.conf /run/systemd/resolve/stub-resolv.conf /dangling/file /nowhere/at/all/file /made/up/file
		stat -c '%a %n' /root /made /made/up
		mkdir /run/l /run/u /run/w && mount -t overlay overlay -o lowerdir=/run/l,upperdir=/run/u,workdir=/run/w /mnt && echo x >/mnt/x && cat /run/u/x`).
		mount("bind", writeFile(b.T, "nameserver 192.0.2.1\n", dir, "resolv.conf"), "/etc/resolv.conf", "rbind", "ro").
		mount("bind", dir, "/dangling", "rbind", "ro").
		mount("bind", filepath.Join(dir, "file"), "/made/up/file", "rbind", "ro").
		mount("tmpfs", "tmpfs", "/root", "nosuid")
	s.Root.Path = root
	for _, set := range []*[]string{&s.Process.Capabilities.Bounding, &s.Process.Capabilities.Effective, &s.Process.Capabilities.Permitted} {
		*set = append(*set, "CAP_SYS_ADMIN")
	}
	want := "nameserver 192.0.2.1\nnameserver 192.0.2.1\nthere\nthere\nthere\n700 /root\n755 /made\n755 /made/up\nx\n"
	if r := b.runSpec("points", s); r.Code != 0 || r.Stdout != want {
		b.Errorf("got %+v, want %q", r, want)
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

// unmountTime bounds the wait for the end of a file system that nobody should hold any more.
const unmountTime = 30 * time.Second

// watchUnmount returns a function that waits until the file system that dir is on
// has ended: not one mount of it, in whatever namespace, but the last reference to
// it, such as a file that a daemon has open (inotify(7), IN_UNMOUNT).
func (b *box) watchUnmount(dir string) (wait func()) {
	b.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { unix.Close(fd) })
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_ONLYDIR|unix.IN_DELETE_SELF); err != nil {
		b.Fatal(err)
	}
	return func() {
		b.Helper()
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(unmountTime.Milliseconds()))
		if err != nil || n != 1 {
			b.Errorf("%s: its file system is still in use, %v after its last mount went: %v", dir, unmountTime, err)
		}
	}
}

// testRemovedRoot: what a deleted container had of the host is free at once, though
// its pod goes on and the guest may still be asked to clean up after it.
func testRemovedRoot(b *box) {
	root, volume := b.TempDir(), b.TempDir()
	for dir, options := range map[string]string{root: "size=8m", volume: "size=1m"} {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
			b.Fatal(err)
		}
	}
	ended := []func(){b.watchUnmount(root), b.watchUnmount(volume)}
	if err := os.CopyFS(root, os.DirFS(rootfs(b.T))); err != nil {
		b.Error(err)
	}
	s := script(b.T, "dd if=/dev/zero of=/written bs=64k count=16 2>/dev/null; echo x >/volume/file; cat /volume/file").mount("bind", volume, "/volume", "rbind", "rw")
	s.Root.Path = root
	if r := b.runSpec("removed", s); r.Code != 0 || r.Stdout != "x\n" {
		b.Errorf("the container: %+v", r)
	}
	for _, dir := range []string{root, volume} {
		if err := unix.Unmount(dir, 0); err != nil {
			b.Errorf("unmount %s: %v", dir, err)
		}
	}
	for _, wait := range ended {
		wait()
	}
}

// testSameName: a container sees its own root and volumes, however soon it follows
// another of its name.
func testSameName(b *box) {
	for i := range 4 {
		root, volume, want := b.TempDir(), filepath.Join(b.TempDir(), "volume"), fmt.Sprintf("%d\n%d\n", i, i)
		if err := os.CopyFS(root, os.DirFS(rootfs(b.T))); err != nil {
			b.Fatal(err)
		}
		if err := os.Mkdir(volume, 0o755); err != nil {
			b.Fatal(err)
		}
		for _, file := range []string{filepath.Join(root, "which"), filepath.Join(volume, "which")} {
			if err := os.WriteFile(file, fmt.Appendln(nil, i), 0o644); err != nil {
				b.Fatal(err)
			}
		}
		s := script(b.T, "cat /which /volume/which").mount("bind", volume, "/volume", "rbind", "rw")
		s.Root.Path = root
		if r := b.runSpec("same", s); r.Code != 0 || r.Stdout != want {
			b.Errorf("container %d of the name: %+v, want %q", i, r, want)
		}
	}
}
