// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// daemonC is the daemon of QEMU 7.2 as Debian ships it.
const daemonC = "/usr/lib/qemu/virtiofsd"

func TestDaemonArguments(t *testing.T) {
	o := DaemonOptions{Dir: "/share", ExtraArgs: []string{"-o", "posix_acl"}}
	for _, c := range []struct {
		rust        bool
		cache, want string
	}{
		{false, "", "--fd=3 -f -o source=/share -o cache=auto -o sandbox=namespace -o xattr -o announce_submounts -o log_level=warn --rlimit-nofile=4096 -o posix_acl"},
		{false, "always", "--fd=3 -f -o source=/share -o cache=always -o sandbox=namespace -o xattr -o announce_submounts -o log_level=warn --rlimit-nofile=4096 -o posix_acl"},
		{false, "never", "--fd=3 -f -o source=/share -o cache=none -o sandbox=namespace -o xattr -o announce_submounts -o log_level=warn --rlimit-nofile=4096 -o posix_acl"},
		{false, "metadata", "--fd=3 -f -o source=/share -o cache=none -o sandbox=namespace -o xattr -o announce_submounts -o log_level=warn --rlimit-nofile=4096 -o posix_acl"},
		{true, "", "--fd=3 --shared-dir=/share --cache=auto --sandbox=namespace --xattr --announce-submounts --inode-file-handles=never --seccomp=kill --rlimit-nofile=4096 --log-level=warn -o posix_acl"},
		{true, "metadata", "--fd=3 --shared-dir=/share --cache=metadata --sandbox=namespace --xattr --announce-submounts --inode-file-handles=never --seccomp=kill --rlimit-nofile=4096 --log-level=warn -o posix_acl"},
		{true, "never", "--fd=3 --shared-dir=/share --cache=never --sandbox=namespace --xattr --announce-submounts --inode-file-handles=never --seccomp=kill --rlimit-nofile=4096 --log-level=warn -o posix_acl"},
		{true, "auto mandatory", "--fd=3 --shared-dir=/share --cache=auto --sandbox=namespace --xattr --announce-submounts --inode-file-handles=mandatory --seccomp=kill --rlimit-nofile=4096 --log-level=warn -o posix_acl"},
	} {
		o.Cache, o.FileHandles, _ = strings.Cut(c.cache, " ")
		if got := strings.Join(daemonArguments(c.rust, o, 4096), " "); got != c.want {
			t.Errorf("rust %v, cache %q:\n%s\nwant\n%s", c.rust, c.cache, got, c.want)
		}
	}
}

func TestFileLimit(t *testing.T) {
	var lim unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &lim))
	small, _, err := fileLimit(256 << 20)
	must(t, err)
	large, enough, err := fileLimit(1 << 40)
	must(t, err)
	if enough != (large == 1<<30) || small < min(lim.Max, leastFiles) || small > leastFiles || large < small || large > 1<<30 {
		t.Errorf("%d files for a guest of 256 MiB, %d for one of 1 TiB; the limit here is %d", small, large, lim.Max)
	}
}

func TestFlavour(t *testing.T) {
	for path, want := range map[string]bool{daemonC: false, "testdata/rust": true} {
		got, err := isRust(context.Background(), path)
		if err != nil || got != want {
			t.Errorf("%s: %v, %v; want %v", path, got, err, want)
		}
	}
	if _, err := isRust(context.Background(), "/bin/false"); err == nil || !strings.Contains(err.Error(), "/bin/false") {
		t.Errorf("a program that fails: %v", err)
	}
}

// startDaemon starts the real daemon and waits until it answers the VMM's end.
func startDaemon(t *testing.T) (*Daemon, *os.File) {
	t.Helper()
	dir := t.TempDir()
	listener, client, err := Listen(filepath.Join(dir, "fs.sock"))
	must(t, err)
	t.Cleanup(func() { client.Close() })
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("the socket's name is left: %v, %v", left, err)
	}
	var pid int
	d, err := StartDaemon(context.Background(), DaemonOptions{
		Path: daemonC, Dir: dir, Started: func(_ string, p int) error { pid = p; return nil },
	}, listener)
	must(t, err)
	t.Cleanup(d.Stop)
	if pid != d.PID() || pid == 0 {
		t.Errorf("Started was told of %d, the daemon is %d", pid, d.PID())
	}
	if err := getFeatures(client); err != nil {
		t.Fatalf("the daemon does not speak vhost-user: %v", err)
	}
	return d, client
}

// getFeatures is a vhost-user request: its number, the version flag and no
// payload (QEMU docs/interop/vhost-user.rst).
func getFeatures(f *os.File) error {
	b := make([]byte, 12)
	binary.NativeEndian.PutUint32(b, 1)
	binary.NativeEndian.PutUint32(b[4:], 1)
	if _, err := f.Write(b); err != nil {
		return err
	}
	_, err := io.ReadFull(pollReader{f}, make([]byte, 20))
	return err
}

// pollReader bounds the wait for data.
type pollReader struct{ f *os.File }

func (r pollReader) Read(p []byte) (int, error) {
	fds := []unix.PollFd{{Fd: int32(r.f.Fd()), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds, 10_000); err != nil || n == 0 {
		return 0, errors.Join(err, errors.New("no answer"))
	}
	return r.f.Read(p)
}

func waitDone(t *testing.T, d *Daemon) {
	t.Helper()
	select {
	case <-d.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the daemon's end goes unnoticed")
	}
}

func TestDaemonStop(t *testing.T) {
	d, _ := startDaemon(t)
	if err := d.Err(); err != nil {
		t.Errorf("Err of a live daemon: %v", err)
	}
	d.Stop()
	waitDone(t, d)
	d.Stop() // again
	if err := d.Err(); err != nil {
		t.Errorf("Err after Stop: %v", err)
	}
	if err := syscall.Kill(d.PID(), 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the process: %v", err)
	}
}

func TestDaemonKilled(t *testing.T) {
	d, _ := startDaemon(t)
	must(t, syscall.Kill(d.PID(), syscall.SIGKILL))
	waitDone(t, d)
	if err := d.Err(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("Err: %v", err)
	}
	d.Stop()
	if err := d.Err(); err == nil {
		t.Error("a later Stop hides why the daemon ended")
	}
}

// The daemon ends with the VMM's connection; that is orderly when it was announced.
func TestDaemonEndsWithTheVMM(t *testing.T) {
	d, client := startDaemon(t)
	d.Expect()
	client.Close()
	waitDone(t, d)
	if err := d.Err(); err != nil {
		t.Errorf("Err: %v", err)
	}
}

func TestDaemonThatDoesNotStart(t *testing.T) {
	refused := errors.New("refused")
	for name, c := range map[string]struct {
		o    DaemonOptions
		want string
	}{
		"missing": {DaemonOptions{Path: "/nonexistent/virtiofsd"}, "/nonexistent/virtiofsd"},
		"handles": {DaemonOptions{Path: daemonC, FileHandles: "prefer"}, `virtio_fs_inode_file_handles is "prefer": ` + daemonC},
		"started": {DaemonOptions{Path: daemonC, Started: func(string, int) error { return refused }}, "refused"},
	} {
		t.Run(name, func(t *testing.T) {
			c.o.Dir = t.TempDir()
			listener, client, err := Listen(filepath.Join(c.o.Dir, "fs.sock"))
			must(t, err)
			defer client.Close()
			if _, err := StartDaemon(context.Background(), c.o, listener); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v; want %q", err, c.want)
			}
			// Nobody holds the listener any more: the VMM's end reads the end.
			if _, err := (pollReader{client}).Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the VMM's end of the connection: %v", err)
			}
		})
	}
}

// worker is the process that serves: the daemon in C forks it into its sandbox.
func worker(t *testing.T, d *Daemon) int {
	t.Helper()
	children := strings.Fields(read(t, fmt.Sprintf("/proc/%d/task/%d/children", d.PID(), d.PID())))
	if len(children) != 1 {
		t.Fatalf("the daemon has the children %q; want one", children)
	}
	pid, err := strconv.Atoi(children[0])
	must(t, err)
	return pid
}

// What serves a hostile guest has no more than serving files of any user takes,
// sees nothing but the share, and may make few system calls.
func TestDaemonIsConfined(t *testing.T) {
	d, _ := startDaemon(t)
	pid, dir := worker(t, d), ""
	for _, arg := range d.cmd.Args {
		if source, ok := strings.CutPrefix(arg, "source="); ok {
			dir = source
		}
	}
	status := map[string]string{}
	for line := range strings.Lines(read(t, fmt.Sprintf("/proc/%d/status", pid))) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), ":")
		status[k] = strings.TrimSpace(v)
	}
	// chown, dac_override, fowner, fsetid, setgid, setuid, mknod, setfcap
	// (include/uapi/linux/capability.h): to act as any user on files of any owner.
	const serve = "00000000880000db"
	const none = "0000000000000000"
	for key, want := range map[string]string{"CapEff": serve, "CapPrm": serve, "CapInh": none, "CapBnd": none, "CapAmb": none, "Seccomp": "2", "NoNewPrivs": "1"} {
		if status[key] != want {
			t.Errorf("%s is %s; want %s", key, status[key], want)
		}
	}
	mounts := strings.Split(strings.TrimSpace(read(t, fmt.Sprintf("/proc/%d/mountinfo", pid))), "\n")
	if f := strings.Fields(mounts[0]); len(mounts) != 1 || f[3] != dir || f[4] != "/" {
		t.Errorf("it sees %q; want %s alone", mounts, dir)
	}
	for _, ns := range []string{"mnt", "net", "pid"} {
		theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
		must(t, err)
		if ours, err := os.Readlink("/proc/self/ns/" + ns); err != nil || ours == theirs {
			t.Errorf("it shares our namespace %s, %v", ours, err)
		}
	}
	var files unix.Rlimit
	must(t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &files))
	if limit, _ := d.Files(); uint64(limit) != files.Cur {
		t.Errorf("it may open %d files, and says %d", files.Cur, limit)
	}
	before, err := d.Open()
	fds, err2 := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil || err2 != nil || max(before, len(fds))-min(before, len(fds)) > 2 { // it may open one meanwhile
		t.Errorf("it has %d files open, %v; there are %d, %v", before, err, len(fds), err2)
	}
	// As many as its arguments say; root may raise its own limit with CAP_SYS_RESOURCE alone.
	if want, _, err := fileLimit(0); err != nil || want > leastFiles || files.Cur != want || files.Max != want {
		t.Errorf("it may open %d files, or %d; want %d, %v", files.Cur, files.Max, want, err)
	}
}
