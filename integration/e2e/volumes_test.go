// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// writeVolume writes a volume as kubelet does (pkg/volume/util/atomic_writer.go):
// the files in a new directory, then the link to it replaced, then the old one removed.
func writeVolume(t *testing.T, dir, version string, files map[string]string) {
	t.Helper()
	old, _ := os.Readlink(filepath.Join(dir, "..data"))
	for name, content := range files {
		writeFile(t, content, dir, ".."+version, name)
		if err := os.Symlink("..data/"+name, filepath.Join(dir, name)); err != nil && !os.IsExist(err) {
			t.Fatal(err)
		}
	}
	tmp := filepath.Join(dir, "..data_tmp")
	if err := os.Symlink(".."+version, tmp); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
	if old != "" {
		if err := os.RemoveAll(filepath.Join(dir, old)); err != nil {
			t.Fatal(err)
		}
	}
}

// probeDir is where the program testdata/probe is, built once.
func probeDir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(workDir(t), "probe")
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", dir+"/probe", "./testdata/probe")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build probe: %v: %s", err, out)
	}
	return dir
}

// testSyncedVolumes: a ConfigMap and a file that an engine writes are in the
// guest's memory, follow the host, and tell their watchers so.
func testSyncedVolumes(b *box) {
	pod := filepath.Join(b.TempDir(), "pods", "uid")
	config := filepath.Join(pod, "volumes", "kubernetes.io~configmap", "config")
	writeVolume(b.T, config, "1", map[string]string{"key": "one", "other": "fixed"})
	if err := os.Chmod(filepath.Join(config, "..1", "key"), 0o440); err != nil {
		b.Fatal(err)
	}
	hosts := writeFile(b.T, "192.0.2.7 seven\n", pod, "hosts")
	s := script(b.T, "exec /tools/probe notify /config >/events").
		mount("bind", probeDir(b.T), "/tools", "rbind", "ro").
		mount("bind", config, "/config", "rbind", "rprivate", "ro").
		mount("bind", hosts, "/etc/hosts", "rbind", "rprivate", "ro")
	b.startSpec("synced", s)
	if got := b.shell("synced", "cat /config/key /config/other /etc/hosts; stat -L -c %a /config/key; readlink /config/..data"); got != "onefixed192.0.2.7 seven\n440\n..1" {
		b.Errorf("the container reads %q", got)
	}
	for _, at := range []string{"/config", "/etc/hosts"} {
		if got := b.shell("synced", "grep ' "+at+" ' /proc/mounts"); strings.Contains(got, "virtiofs") || !strings.Contains(got, " ro,") {
			b.Errorf("%s is mounted as %q; want the guest's memory, read-only", at, got)
		}
	}
	b.shell("synced", "until grep -q ready /events; do usleep 10000; done")
	began := time.Now()
	writeVolume(b.T, config, "2", map[string]string{"key": "two", "other": "fixed"})
	b.shell("synced", "until [ \"$(cat /config/key)\" = two ]; do usleep 5000; done")
	at, err := strconv.ParseInt(b.shell("synced", "until grep -q '^[.][.]data ' /events; do usleep 5000; done; ! ls -a /config | grep -q '^[.][.]1$' && sed -n 's/^[.][.]data //p' /events"), 10, 64)
	if err != nil {
		b.Fatal(err)
	}
	b.Logf("the workload's inotify event came %v after the host began to write, by the guest's clock", time.Unix(0, at).Sub(began))
	writeFile(b.T, "192.0.2.8 eight\n", hosts)
	b.shell("synced", "until grep -q eight /etc/hosts; do usleep 5000; done")
	if r := b.exec("synced", "sh", "-c", "echo x >/config/key"); r.Code == 0 {
		b.Error("a container wrote to a ConfigMap")
	}
	b.remove("synced")
}

// testWrittenFiles: a container's termination log and /etc/hosts, which it may
// write to, are in the guest's memory; what it wrote is on the host when its exit
// is told, and containers of the pod see each other's lines at once.
func testWrittenFiles(b *box) {
	pod := filepath.Join(b.TempDir(), "pods", "uid")
	hosts, log := writeFile(b.T, "192.0.2.7 seven\n", pod, "etc-hosts"), writeFile(b.T, "", pod, "containers", "main", "1a2b3c4d")
	b.startSpec("stays", member(b.T, "sleep", "1000").mount("bind", hosts, "/etc/hosts", "rbind", "rprivate", "rw"))
	s := member(b.T, "sh", "-c", "grep -c 'virtiofs.* /etc/hosts ' /proc/mounts; cat /etc/hosts; echo 192.0.2.9 nine >>/etc/hosts; echo last words >/dev/termination-log").
		mount("bind", hosts, "/etc/hosts", "rbind", "rprivate", "rw").
		mount("bind", log, "/dev/termination-log", "rbind", "rprivate", "rw")
	if r := b.runSpec("writes", s); r.Stdout != "0\n192.0.2.7 seven\n" {
		b.Errorf("the container: %+v", r)
	}
	for path, want := range map[string]string{log: "last words\n", hosts: "192.0.2.7 seven\n192.0.2.9 nine\n"} {
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			b.Errorf("%s holds %q, %v; want %q", path, got, err, want)
		}
	}
	if got := b.shell("stays", "cat /etc/hosts"); got != "192.0.2.7 seven\n192.0.2.9 nine" {
		b.Errorf("the other container reads %q", got)
	}
	writeFile(b.T, "192.0.2.8 eight\n", hosts)
	b.shell("stays", "until grep -q eight /etc/hosts; do usleep 5000; done")
	b.remove("stays")
}

// testPodVolumes: what containers of a pod share with each other. An emptyDir on
// disk carries sockets; one in memory is the guest's, of the size that kubelet
// gave the host's, and is still there for the next container.
func testPodVolumes(b *box) {
	pod := filepath.Join(b.TempDir(), "pods", "uid", "volumes", "kubernetes.io~empty-dir")
	disk, memory := filepath.Join(pod, "disk"), filepath.Join(pod, "memory")
	for _, dir := range []string{disk, memory} {
		if err := os.MkdirAll(dir, 0o777); err != nil {
			b.Fatal(err)
		}
	}
	mountTmpfs(b.T, memory, "size=1m,mode=2777,gid=2000")
	volumes := func(script string) *spec {
		return member(b.T, "sh", "-c", script).mount("bind", probeDir(b.T), "/tools", "rbind", "ro").
			mount("bind", disk, "/disk", "rbind", "rprivate", "rw").mount("bind", memory, "/memory", "rbind", "rprivate", "rw")
	}
	b.startSpec("one", volumes("echo one >/memory/one; exec /tools/probe listen /disk/socket"))
	b.startSpec("two", volumes("exec sleep 1000"))
	if got := b.shell("two", "until [ -S /disk/socket ]; do usleep 10000; done; /tools/probe dial /disk/socket"); got != "hello" {
		b.Errorf("the socket of the other container says %q", got)
	}
	if st, err := os.Stat(filepath.Join(disk, "socket")); err != nil || st.Mode()&os.ModeSocket == 0 {
		b.Errorf("the socket on the host: %v, %v", st, err)
	}
	if got := b.shell("two", "cat /memory/one; stat -c '%a %g' /memory; grep ' /memory ' /proc/mounts | cut -d' ' -f3; df -k /memory | tail -1 | tr -s ' ' | cut -d' ' -f2"); got != "one\n2777 2000\ntmpfs\n1024" {
		b.Errorf("the volume in memory: %q", got)
	}
	if r := b.exec("two", "sh", "-c", "head -c 2000000 /dev/zero >/memory/big"); r.Code == 0 {
		b.Error("2 MB went into a volume of 1 MiB")
	}
	b.remove("one")
	b.remove("two")
	if r := b.runSpec("three", volumes("cat /memory/one")); r.Stdout != "one\n" {
		b.Errorf("a later container finds %+v", r)
	}
}

// testGroupDirectory: what groupDirectory says, with the daemon that is installed.
func testGroupDirectory(b *box) {
	dir := b.TempDir()
	b.startSpec("group", member(b.T, "sleep", "1000").mount("bind", dir, "/d", "rbind", "rw"))
	b.groupDirectory("group", dir, "/d")
	b.remove("group")
}

// groupDirectory checks a directory that only a group may write to, as the kubelet
// makes a volume with an fsGroup: FUSE does not tell the daemon of the user's
// additional groups, and the guest's kernel alone decides. at is where the host's
// dir is in the container.
func (b *box) groupDirectory(id, dir, at string) {
	b.Helper()
	group := filepath.Join(dir, "group")
	if err := errors.Join(os.Mkdir(group, 0), os.Chown(group, 0, 2000), os.Chmod(group, 0o770|os.ModeSetgid)); err != nil {
		b.Fatal(err)
	}
	const names = "file sub link fifo"
	script := `cp /etc/group /tmp/was; echo volume:x:2000:user >>/etc/group; cd ` + at + `/group
		su -s /bin/sh user -c 'id -G; echo x >file; mkdir sub; ln -s file link; mkfifo fifo; stat -c "%u %g %a" ` + names + `; cat file; rm file; mv sub moved'
		su -s /bin/sh nobody -c 'echo x >other' 2>&1; su -s /bin/sh nobody -c 'mkdir other' 2>&1; ls; cat /tmp/was >/etc/group; rm /tmp/was`
	want := "1000 10 2000\n1000 2000 644\n1000 2000 2755\n1000 2000 777\n1000 2000 644\nx\n" +
		"sh: can't create other: Permission denied\nmkdir: can't create directory 'other': Permission denied\nfifo\nlink\nmoved"
	if got := b.shell(id, script); got != want {
		b.Errorf("in the group's directory:\n%s\nwant\n%s", got, want)
	}
	st, err := os.Stat(filepath.Join(group, "moved"))
	if err != nil {
		b.Fatal(err)
	}
	if sys := st.Sys().(*syscall.Stat_t); sys.Uid != 1000 || sys.Gid != 2000 {
		b.Errorf("on the host the directory belongs to %d:%d", sys.Uid, sys.Gid)
	}
}

// testPropagation: what the host mounts after the container's start below a
// shared mount arrives with HostToContainer, and goes again; a part of a directory
// (subPath) is nothing but that part.
func testPropagation(b *box) {
	dir := b.TempDir()
	mountTmpfs(b.T, dir, "size=1m")
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		b.Fatal(err)
	}
	later := filepath.Join(dir, "later")
	writeFile(b.T, "covered", later, "there")
	writeFile(b.T, "part", dir, "sub", "file")
	b.startSpec("prop", member(b.T, "sleep", "1000").
		mount("bind", dir, "/slave", "rbind", "rslave", "rw").
		mount("bind", dir, "/ro", "rbind", "rslave", "ro").
		mount("bind", dir, "/private", "rbind", "rprivate", "rw").
		mount("bind", filepath.Join(dir, "sub"), "/sub", "rbind", "rprivate", "rw").
		mount("bind", filepath.Join(dir, "sub", "file"), "/file", "rbind", "rprivate", "ro"))
	b.shell("prop", "cat /slave/later/there /ro/later/there /private/later/there")
	if got := b.shell("prop", "ls /sub; cat /file"); got != "file\npart" {
		b.Errorf("parts of the directory: %q", got)
	}
	if err := unix.Mount("tmpfs", later, "tmpfs", 0, "size=64k"); err != nil {
		b.Fatal(err)
	}
	mounted := true
	b.Cleanup(func() {
		if mounted {
			unix.Unmount(later, unix.MNT_DETACH) //nolint:errcheck // the test has failed already
		}
	})
	writeFile(b.T, "mounted", later, "there")
	for _, at := range []string{"/slave", "/ro"} {
		b.shell("prop", "until grep -q mounted "+at+"/later/there; do usleep 50000; done")
	}
	if r := b.exec("prop", "sh", "-c", "echo x >/ro/later/new"); r.Code == 0 {
		b.Error("what arrived below a read-only mount takes writes")
	}
	if got := b.shell("prop", "echo x >/slave/later/new; cat /private/later/there"); got != "covered" {
		b.Errorf("without propagation: %q", got)
	}
	if got := readFile(b.T, filepath.Join(later, "new")); got != "x\n" {
		b.Errorf("the host reads %q", got)
	}
	// Lazily: the guest's knowledge of files there keeps virtiofsd's copy of the mount busy.
	if err := unix.Unmount(later, unix.MNT_DETACH); err != nil {
		b.Errorf("the host cannot unmount: %v", err)
	} else {
		mounted = false
	}
	b.shell("prop", "until grep -q covered /slave/later/there; do usleep 50000; done")
	b.remove("prop")
}

// mountTmpfs mounts one at a directory that is there, until the test's end.
func mountTmpfs(t *testing.T, dir, options string) {
	t.Helper()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
}

// testBadVolumes: a mount that would leave the container through a symbolic link
// stays in it; a volume that cannot be is refused by name; the container beside it
// goes on.
func testBadVolumes(b *box) {
	outside, root := b.TempDir(), rootfs(b.T)
	link := filepath.Join(root, "leave")
	if err := errors.Join(os.MkdirAll(filepath.Join(root, outside), 0o755), os.Symlink(strings.Repeat("../", 12)+outside, link)); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := os.Remove(link); err != nil {
			b.Error(err)
		}
		os.RemoveAll(filepath.Join(root, outside)) //nolint:errcheck // TestMain removes all of it
	})
	src := b.TempDir()
	writeFile(b.T, "inside", src, "file")
	s := script(b.T, "cat /leave/mnt/file").mount("bind", src, "/leave/mnt", "rbind", "ro")
	if r := b.runSpec("leave", s); r.Stdout != "inside" {
		b.Errorf("a mount by way of a link: %+v", r)
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		b.Errorf("the host's directory has %v, %v", left, err)
	}

	volumes := filepath.Join(b.TempDir(), "pods", "uid", "volumes")
	huge := filepath.Join(volumes, "kubernetes.io~empty-dir", "huge")
	if err := os.MkdirAll(huge, 0o755); err != nil {
		b.Fatal(err)
	}
	if err := unix.Mount("hugetlbfs", huge, "hugetlbfs", 0, "pagesize=2M"); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := unix.Unmount(huge, 0); err != nil {
			b.Error(err)
		}
	})
	pages := func(limit uint64) *spec {
		s := script(b.T, "grep ' /huge ' /proc/mounts | cut -d' ' -f3; df -k /huge | tail -1 | tr -s ' ' | cut -d' ' -f2").mount("bind", huge, "/huge", "rbind", "rw")
		if limit > 0 {
			s.Linux.Resources.HugepageLimits = []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: limit}}
		}
		return s
	}
	b.refused("huge pages without a limit", b.runSpec("refused", pages(0)), "/huge", "hugepageLimits", "2MB")
	b.refused("more huge pages than memory", b.runSpec("refused", pages(1<<40)), "huge pages", "more memory")
	if r := b.runSpec("huge", pages(4<<20)); r.Stdout != "hugetlbfs\n4096\n" {
		b.Errorf("4 MiB of huge pages: %+v", r)
	}
	missing := filepath.Join(volumes, "kubernetes.io~configmap", "gone")
	b.refused("a volume that is missing", b.runSpec("refused", script(b.T, "true").mount("bind", missing, "/gone", "rbind", "ro")), "/gone", missing)
	if got := b.shell(podID, "echo on"); got != "on" {
		b.Errorf("the pod's other container: %q", got)
	}
}
