// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/integration/lab"
)

// TestRustVirtiofsd: the other virtio-fs daemon serves root filesystem and bind
// mounts too. With virtio_fs_inode_file_handles it needs no descriptor for each
// file that the guest knows, and one capability more.
func TestRustVirtiofsd(t *testing.T) {
	b := newBox(t)
	path, err := lab.RustVirtiofsd()
	if err != nil {
		t.Fatal(err)
	}
	config := setKey(readFile(t, b.c.ConfigFile()), "hypervisor.qemu", "virtio_fs_daemon", strconv.Quote(path))
	config = writeFile(t, setKey(config, "hypervisor.qemu", "virtio_fs_inode_file_handles", `"prefer"`), t.TempDir(), "kata.toml")
	dir := t.TempDir()
	mountTmpfs(t, dir, "size=32m") // which has handles, wherever the tests run
	writeFile(t, "from the host", dir, "in")
	b.start("rust", []string{"--runtime-config-path", config, "--mount", fmt.Sprintf("type=bind,src=%s,dst=/d,options=rbind:rw", dir)}, "sleep", "1000")
	if got := b.shell("rust", "cat /d/in; echo x >/rootfile; cat /rootfile; chown 1000 /rootfile; stat -c %u /rootfile; echo from the guest >/d/out"); got != "from the hostx\n1000" {
		b.Errorf("got %q", got)
	}
	if got := readFile(t, filepath.Join(dir, "out")); got != "from the guest\n" {
		b.Errorf("the host reads %q", got)
	}
	b.groupDirectory("rust", dir, "/d")
	// It is that daemon indeed.
	f := b.family("rust")
	if exe, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", f.daemon)); err != nil || !strings.Contains(string(exe), filepath.Dir(path)) {
		b.Errorf("the daemon's command is %q, %v; want one below %s", exe, err, filepath.Dir(path))
	}
	// The eight of sandbox/storage's TestDaemonIsConfined, and dac_read_search.
	status := readFile(t, fmt.Sprintf("/proc/%d/status", f.worker))
	for _, line := range []string{"CapEff:\t00000000880000df", "CapPrm:\t00000000880000df", "CapBnd:\t0000000000000000", "CapAmb:\t0000000000000000", "Seccomp:\t2", "NoNewPrivs:\t1"} {
		if !strings.Contains(status, line+"\n") {
			t.Errorf("the daemon's status lacks %q:\n%s", line, status)
		}
	}
	b.knowsManyFiles(f.worker, filepath.Join(dir, "tree"), "/d/tree")
	b.remove("rust")
}

// knowsManyFiles has the guest look at more files than the daemon may have
// descriptors, which the test bounds. at is the tree's place in the guest.
func (b *box) knowsManyFiles(daemon int, tree, at string) {
	b.Helper()
	const files, limit = 300, 100
	for i := range files {
		writeFile(b.T, "x", tree, strconv.Itoa(i%10), strconv.Itoa(i))
	}
	bound := unix.Rlimit{Cur: limit, Max: limit}
	if err := unix.Prlimit(daemon, unix.RLIMIT_NOFILE, &bound, nil); err != nil {
		b.Fatal(err)
	}
	if got := b.shell("rust", "cat "+at+"/*/* | wc -c"); got != strconv.Itoa(files) {
		b.Errorf("of %d files of one byte the guest reads %q", files, got)
	}
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", daemon))
	if err != nil || len(open) > limit {
		b.Errorf("the daemon has %d files open, %v; want at most %d", len(open), err, limit)
	}
	b.Logf("the daemon has %d files open, the guest knows %d", len(open), files)
}

const (
	// fileLimit is how many files a daemon may have open in knowsMore, if the shim
	// cannot give it more, and manyFiles how many the guest is shown.
	fileLimit = 9000
	manyFiles = 10_000
)

// lowLimit bounds what containerd, and so its shims, may have open, and fills a directory.
func (b *box) lowLimit(dir string) {
	b.Helper()
	var limit unix.Rlimit
	err := unix.Prlimit(b.c.PID(), unix.RLIMIT_NOFILE, nil, &limit)
	if err == nil {
		limit.Max = min(limit.Max, fileLimit)
		limit.Cur = limit.Max
		err = unix.Prlimit(b.c.PID(), unix.RLIMIT_NOFILE, &limit, nil)
	}
	if err != nil {
		b.Fatal(err)
	}
	for i := range manyFiles {
		writeFile(b.T, "", dir, strconv.Itoa(i%100), strconv.Itoa(i))
	}
}

// knowsMore has the guest look at more files than its daemon may have open: it
// forgets some in time, and loses neither files nor mounts.
func (b *box) knowsMore(id string) {
	b.Helper()
	daemon := b.family(id).worker
	var limit unix.Rlimit
	if err := unix.Prlimit(daemon, unix.RLIMIT_NOFILE, nil, &limit); err != nil {
		b.Fatal(err)
	}
	if got := b.shell(id, "find /many -type f | wc -l; ls /many | wc -l"); got != strconv.Itoa(manyFiles)+"\n100" {
		b.Errorf("of %d files in 100 directories the guest finds %q", manyFiles, got)
	}
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", daemon))
	if err != nil || uint64(len(open)) > limit.Cur {
		b.Errorf("the daemon has %d files open, %v; its limit is %d", len(open), err, limit.Cur)
	}
	b.Logf("the daemon has %d files open, its limit is %d", len(open), limit.Cur)
}
