// SPDX-License-Identifier: Apache-2.0

package leak

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// run runs a command that must succeed.
func run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// start starts a process that ends with the test at the latest.
func start(t *testing.T, args ...string) (pid int, stop func()) {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// What is started here says that it is up by a first byte.
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatalf("%s: %v", strings.Join(args, " "), err)
	}
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	t.Cleanup(stop)
	return cmd.Process.Pid, stop
}

func snapshot(t *testing.T) State {
	t.Helper()
	s, err := Take()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestEveryClassIsCaught plants one leak of each class, expects it in the
// difference, takes it away again, and expects none.
func TestEveryClassIsCaught(t *testing.T) {
	id := fmt.Sprintf("kl%d", os.Getpid()%100000)
	dir := t.TempDir()
	target := filepath.Join(dir, "mnt")
	if err := os.Mkdir(target, 0o755); err != nil {
		t.Fatal(err)
	}
	// Places that exist before: another mount namespace and another network namespace with a link.
	other, _ := start(t, "unshare", "--mount", "--net", "sh", "-c", "echo up; exec sleep 100")
	enter := func(args ...string) []string {
		return append([]string{"nsenter", "--target", fmt.Sprint(other), "--mount", "--net"}, args...)
	}
	run(t, enter("ip", "tuntap", "add", "here", "mode", "tap")...)
	image := filepath.Join(dir, "loop.img")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	cgroup := firstCgroupDir(t)

	for _, c := range []struct {
		name  string
		class Class
		what  string
		plant func(t *testing.T) (remove func())
	}{
		{"child", Process, "sleep 4242", func(t *testing.T) func() {
			_, stop := start(t, "sh", "-c", "echo up; exec sleep 4242")
			return stop
		}},
		{"orphan with an empty environment", Process, "sleep 4343", func(t *testing.T) func() {
			pid := run(t, "env", "-i", "/bin/sh", "-c", "setsid sleep 4343 >/dev/null 2>&1 & echo $!")
			return func() { run(t, "kill", "-KILL", pid) }
		}},
		{"own mount namespace", Mount, target, func(t *testing.T) func() {
			run(t, "mount", "-t", "tmpfs", "planted", target)
			return func() { run(t, "umount", target) }
		}},
		{"other mount namespace", Mount, target, func(t *testing.T) func() {
			run(t, enter("mount", "-t", "tmpfs", "planted", target)...)
			return func() { run(t, enter("umount", target)...) }
		}},
		{"second mount on the same point", Mount, "planted2", func(t *testing.T) func() {
			run(t, enter("mount", "-t", "tmpfs", "planted2", "/mnt")...)
			return func() { run(t, enter("umount", "/mnt")...) }
		}},
		{"named network namespace", NetNS, id, func(t *testing.T) func() {
			run(t, "ip", "netns", "add", id)
			return func() { run(t, "ip", "netns", "del", id) }
		}},
		{"network namespace held by a process", NetNS, "net:[", func(t *testing.T) func() {
			_, stop := start(t, "unshare", "--net", "sh", "-c", "echo up; exec sleep 100")
			return stop
		}},
		{"link", Link, id, func(t *testing.T) func() {
			run(t, "ip", "tuntap", "add", id, "mode", "tap")
			return func() { run(t, "ip", "link", "del", id) }
		}},
		{"link in another namespace", Link, id, func(t *testing.T) func() {
			run(t, enter("ip", "tuntap", "add", id, "mode", "tap")...)
			return func() { run(t, enter("ip", "link", "del", id)...) }
		}},
		{"qdisc", TC, "qdisc ingress", func(t *testing.T) func() {
			run(t, enter("tc", "qdisc", "add", "dev", "here", "ingress")...)
			return func() { run(t, enter("tc", "qdisc", "del", "dev", "here", "ingress")...) }
		}},
		{"filter", TC, "filter u32", func(t *testing.T) func() {
			run(t, enter("tc", "qdisc", "add", "dev", "here", "ingress")...)
			run(t, enter("tc", "filter", "add", "dev", "here", "parent", "ffff:", "protocol", "all", "u32", "match", "u8", "0", "0", "action", "mirred", "egress", "redirect", "dev", "lo")...)
			return func() { run(t, enter("tc", "qdisc", "del", "dev", "here", "ingress")...) }
		}},
		{"cgroup", Cgroup, id, func(t *testing.T) func() {
			path := filepath.Join(cgroup, id)
			run(t, "mkdir", path)
			return func() { run(t, "rmdir", path) }
		}},
		{"loop device", Loop, image, func(t *testing.T) func() {
			dev := run(t, "losetup", "--find", "--show", image)
			return func() { run(t, "losetup", "--detach", dev) }
		}},
		{"socket with a path", Socket, "s.sock", func(t *testing.T) func() { return listen(t, filepath.Join(dir, "s.sock")) }},
		{"abstract socket", Socket, "@" + id, func(t *testing.T) func() { return listen(t, "@"+id) }},
		{"file in /run", File, "/run/" + id, func(t *testing.T) func() { return touch(t, "/run/"+id) }},
		{"file in /dev/shm", File, "/dev/shm/" + id, func(t *testing.T) func() { return touch(t, "/dev/shm/"+id) }},
		{"file with a known name", File, "/tmp/kata-lab-" + id, func(t *testing.T) func() { return touch(t, "/tmp/kata-lab-"+id) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := snapshot(t)
			remove := c.plant(t)
			leaks := Diff(before, snapshot(t))
			remove()
			if !caught(leaks, c.class, c.what) {
				t.Errorf("%s %q is not among:\n%s", c.class, c.what, Format(leaks))
			}
			left, err := Scope{}.Settle(before, SettleTime)
			if err != nil || len(left) > 0 {
				t.Errorf("after it was taken away: %v\n%s", err, Format(left))
			}
		})
	}
}

func caught(leaks []Leak, class Class, what string) bool {
	for _, l := range leaks {
		if l.Class == class && strings.Contains(l.What, what) {
			return true
		}
	}
	return false
}

func listen(t *testing.T, name string) func() {
	t.Helper()
	l, err := net.Listen("unix", name)
	if err != nil {
		t.Fatal(err)
	}
	return func() { l.Close() }
}

func touch(t *testing.T, path string) func() {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return func() { os.Remove(path) }
}

// firstCgroupDir is a directory in which cgroups can be made, of v1 or v2.
func firstCgroupDir(t *testing.T) string {
	t.Helper()
	var fs syscall.Statfs_t
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/pids"} {
		// statfs(2): CGROUP2_SUPER_MAGIC, CGROUP_SUPER_MAGIC
		if err := syscall.Statfs(dir, &fs); err == nil && (fs.Type == 0x63677270 || fs.Type == 0x27e0eb) {
			return dir
		}
	}
	t.Fatal("no cgroup hierarchy below /sys/fs/cgroup")
	return ""
}

// TestForeignProcessesAreLeftOut works on made-up snapshots.
func TestForeignProcessesAreLeftOut(t *testing.T) {
	self := os.Getpid()
	base := map[int]proc{
		1: {start: "1"}, 50: {ppid: 1, start: "5"}, 60: {ppid: 1, start: "6"},
		self: {ppid: 50, start: "9", service: "ci.service"},
	}
	with := func(more map[int]proc) State {
		s := State{procs: map[int]proc{}, items: map[string]item{}}
		for _, m := range []map[int]proc{base, more} {
			for pid, p := range m {
				s.procs[pid] = p
			}
		}
		return s
	}
	const a, b = 1 << 23, 1<<23 + 1 // above any real pid
	for _, c := range []struct {
		name string
		new  map[int]proc
		leak bool
	}{
		{"kernel thread", map[int]proc{a: {ppid: 2, kernel: true}}, false},
		{"child of another shell", map[int]proc{a: {ppid: 60}}, false},
		{"child of the test", map[int]proc{a: {ppid: self}}, true},
		{"grandchild of the test", map[int]proc{a: {ppid: b}, b: {ppid: self}}, true},
		{"orphan", map[int]proc{a: {ppid: 1}}, true},
		{"orphan of another lab", map[int]proc{a: {ppid: b}, b: {ppid: 1, labRoot: "/tmp/other"}}, false},
		{"orphan of another check", map[int]proc{a: {ppid: 1, mark: "other"}}, false},
		{"ours below another shell", map[int]proc{a: {ppid: 60, mark: ourMark}}, true},
		{"another service", map[int]proc{a: {ppid: 1, service: "cron.service"}}, false},
		{"orphan in our service", map[int]proc{a: {ppid: 1, service: "ci.service"}}, true},
		{"pid used again", map[int]proc{60: {ppid: self, start: "77"}}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			after := with(c.new)
			after.add("socket", item{class: Socket, what: "socket", holders: []int{a}})
			leaks := Diff(with(nil), after)
			if got := caught(leaks, Process, ""); got != c.leak {
				t.Errorf("process: leak = %v, want %v: %v", got, c.leak, leaks)
			}
			if _, held := c.new[a]; held && !c.new[a].kernel && caught(leaks, Socket, "") != c.leak {
				t.Errorf("its socket: want %v: %v", c.leak, leaks)
			}
		})
	}
	after := with(map[int]proc{a: {ppid: 1, labRoot: "/tmp/other"}})
	after.add("in", item{class: Mount, what: "inside", path: "/tmp/other/mnt"})
	after.add("beside", item{class: Mount, what: "beside", path: "/tmp/otherwise/mnt"})
	after.add("propagated", item{class: Mount, what: "propagated", holders: []int{60}})
	leaks := Diff(with(nil), after)
	if caught(leaks, Mount, "inside") || !caught(leaks, Mount, "beside") || !caught(leaks, Mount, "propagated") {
		t.Errorf("mounts: %v; want those outside the other lab", leaks)
	}
}

// recorder stands in for the test that Check fails.
type recorder struct {
	testing.TB
	failed string
	undo   []func()
}

func (r *recorder) Helper()                           {}
func (r *recorder) Cleanup(f func())                  { r.undo = append(r.undo, f) }
func (r *recorder) Errorf(format string, args ...any) { r.failed += fmt.Sprintf(format, args...) }

func TestCheckFailsTheTest(t *testing.T) {
	dir := t.TempDir()
	r := &recorder{TB: t}
	const limit = 300 * time.Millisecond
	check(r, limit, Scope{Dirs: []string{dir}})
	defer touch(t, filepath.Join(dir, "left.file"))()
	began := time.Now()
	r.undo[0]()
	if !strings.Contains(r.failed, "file: "+filepath.Join(dir, "left.file")) {
		t.Errorf("Check said %q", r.failed)
	}
	if waited := time.Since(began); waited < limit || waited > limit+3*time.Second {
		t.Errorf("Check waited %v for the file to go; want %v", waited, limit)
	}
}
