// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func itoa(i int) string { return strconv.Itoa(i) }

// TestMain runs the child of TestKilledAtEachStep when the environment says so.
func TestMain(m *testing.M) {
	if root := os.Getenv("LEDGER_TEST_CHILD"); root != "" {
		at, err := strconv.Atoi(os.Getenv("LEDGER_TEST_POINT"))
		if err == nil {
			err = (&victim{root: root, stopAt: at}).run()
		}
		fmt.Println("failed:", err)
		os.Exit(1)
	}
	if root := os.Getenv("LEDGER_TEST_REAPER"); root != "" {
		fmt.Println("reaping")
		if _, err := Reap(context.Background(), root, testKey); err != nil {
			fmt.Println("failed:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// victim acquires one thing after another and stops, to be killed, at a point.
type victim struct {
	root   string
	stopAt int
	point  int
	l      *Ledger
	netns  string
	link   string
}

// reached blocks for ever at the chosen point.
func (v *victim) reached(what string) {
	if v.point == v.stopAt {
		fmt.Println("reached:", what)
		_, _ = io.Copy(io.Discard, os.Stdin)
	}
	v.point++
}

// step records e, then acquires; the kill may come after either.
func (v *victim) step(e Entry, acquire func() error) error {
	if _, err := v.l.Record(e); err != nil {
		return err
	}
	v.reached(e.String() + " recorded")
	if err := acquire(); err != nil {
		return fmt.Errorf("%s: %w", e, err)
	}
	v.reached(e.String() + " acquired")
	return nil
}

func (v *victim) run() (err error) {
	if v.l, err = Create(v.root, testKey, Meta{Sandbox: "victim"}); err != nil {
		return err
	}
	v.reached("created")
	v.link = "kl" + itoa(os.Getppid()) // 15 bytes at most
	v.netns = filepath.Join(v.root, "netns")
	for _, f := range []func() error{v.files, v.mounts, v.namespace, v.links, v.processes, v.cgroups} {
		if err := f(); err != nil {
			return err
		}
	}
	fmt.Println("end")
	_, _ = io.Copy(io.Discard, os.Stdin)
	return nil
}

func (v *victim) files() error {
	file, sock, dir := filepath.Join(v.root, "file"), filepath.Join(v.root, "sock"), filepath.Join(v.root, "dir")
	if err := v.step(File(file), func() error { return os.WriteFile(file, []byte("x"), 0o600) }); err != nil {
		return err
	}
	if err := v.step(Socket(sock), func() error { _, err := net.Listen("unix", sock); return err }); err != nil {
		return err
	}
	return v.step(Dir(dir), func() error {
		if err := os.MkdirAll(dir+"/a/b", 0o700); err != nil {
			return err
		}
		return errors.Join(os.WriteFile(dir+"/a/b/c", nil, 0), os.Symlink("/", dir+"/a/link"))
	})
}

func (v *victim) mounts() error {
	mnt, disk := filepath.Join(v.root, "mnt dir"), filepath.Join(v.root, "disk")
	if err := v.step(Dir(mnt), func() error { return os.Mkdir(mnt, 0o700) }); err != nil {
		return err
	}
	err := v.step(Mount(mnt), func() error {
		// Stacked, to see both go.
		return errors.Join(unix.Mount("kl", mnt, "tmpfs", 0, ""), unix.Mount("kl", mnt, "tmpfs", 0, ""))
	})
	if err != nil {
		return err
	}
	if err := v.step(File(disk), func() error { return os.WriteFile(disk, make([]byte, 1<<16), 0o600) }); err != nil {
		return err
	}
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return err
	}
	dev := "/dev/loop" + itoa(n)
	return v.step(Loop(dev, disk), func() error {
		l, err := os.OpenFile(dev, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		d, err := os.OpenFile(disk, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		return unix.IoctlSetInt(int(l.Fd()), unix.LOOP_SET_FD, int(d.Fd()))
	})
}

func (v *victim) namespace() error {
	return v.step(NetNS(v.netns), func() error {
		if err := os.WriteFile(v.netns, nil, 0o600); err != nil {
			return err
		}
		done := make(chan error)
		go func() {
			runtime.LockOSThread() // never unlocked: the thread ends with its namespace
			err := unix.Unshare(unix.CLONE_NEWNET)
			if err == nil {
				err = unix.Mount("/proc/thread-self/ns/net", v.netns, "", unix.MS_BIND, "")
			}
			done <- err
		}()
		return <-done
	})
}

func (v *victim) links() error {
	tap := func(h *netlink.Handle) error {
		return h.LinkAdd(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: v.link}, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_DEFAULTS})
	}
	bridge := func(h *netlink.Handle) error {
		return h.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: v.link}})
	}
	if err := v.step(Link("", v.link), func() error { return inNetNS("", tap) }); err != nil {
		return err
	}
	ingress := func() error {
		return inNetNS("", func(h *netlink.Handle) error {
			l, err := h.LinkByName(v.link)
			if err != nil {
				return err
			}
			return h.QdiscAdd(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Attrs().Index, Parent: netlink.HANDLE_INGRESS, Handle: netlink.MakeHandle(0xffff, 0)}})
		})
	}
	if err := v.step(Ingress("", v.link), ingress); err != nil {
		return err
	}
	return v.step(Link(v.netns, v.link), func() error { return inNetNS(v.netns, bridge) })
}

func (v *victim) processes() error {
	cmd := exec.Command("sleep", "86399")
	if err := cmd.Start(); err != nil {
		return err
	}
	e, err := Process("sleep", cmd.Process.Pid)
	if err != nil {
		return err
	}
	return v.step(e, func() error { return nil })
}

// cgroupDirs are a place in a version 1 hierarchy and in version 2, as far as the
// machine has them.
func cgroupDirs(name string) (out []string) {
	for _, d := range []string{"/sys/fs/cgroup/pids", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		if onFilesystem(d, unix.CGROUP2_SUPER_MAGIC, unix.CGROUP_SUPER_MAGIC) == nil {
			out = append(out, filepath.Join(d, name))
		}
	}
	return out
}

func (v *victim) cgroups() error {
	for _, dir := range cgroupDirs(v.link) {
		err := v.step(Cgroup(dir), func() error {
			if err := os.MkdirAll(dir+"/sub", 0o755); err != nil {
				return err
			}
			// Nobody recorded these processes: the cgroup is what finds them.
			for _, d := range []string{dir, dir + "/sub"} {
				cmd := exec.Command("sleep", "86398")
				if err := cmd.Start(); err != nil {
					return err
				}
				if err := os.WriteFile(d+"/cgroup.procs", []byte(itoa(cmd.Process.Pid)), 0); err != nil {
					return errors.Join(err, cmd.Process.Kill())
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// TestKilledAtEachStep kills a child with SIGKILL before and after each thing it
// acquires, and finds nothing left after Reap.
func TestKilledAtEachStep(t *testing.T) {
	link := "kl" + itoa(os.Getpid())
	most := 0
	for point := 0; ; point++ {
		root := t.TempDir()
		what := runVictim(t, root, point)
		seen := remains(t, root, link)
		if len(seen) == 0 {
			t.Fatalf("%s: nothing is there, the test sees nothing", what)
		}
		most = max(most, len(seen))
		if _, err := Reap(t.Context(), root, testKey); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if left := remains(t, root, link); len(left) != 0 {
			t.Errorf("killed at %q: left %v", what, left)
		}
		if _, err := Reap(t.Context(), root, testKey); err != nil {
			t.Errorf("%s: second Reap: %v", what, err)
		}
		if what == "end" {
			break
		}
	}
	// Ledger, file, socket, directory, mount point and mount, disk and loop,
	// namespace and mount, two links, process, cgroup with two processes.
	if most < 13 {
		t.Errorf("at most %d things were seen at once; the test does not look at everything", most)
	}
}

// A reaper may be killed as well: another one finishes its work.
func TestKilledReaper(t *testing.T) {
	link := "kl" + itoa(os.Getpid())
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	partly := 0
	for delay := range 6 {
		root := t.TempDir()
		if what := runVictim(t, root, 1000); what != "end" {
			t.Fatalf("victim stopped at %s", what)
		}
		before := len(remains(t, root, link))
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), "LEDGER_TEST_REAPER="+root)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := bufio.NewReader(out).ReadString('\n'); err != nil { // it begins now
			t.Fatal(err)
		}
		time.Sleep(time.Duration(delay) * 800 * time.Microsecond)
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
		if n := len(remains(t, root, link)); n > 0 && n < before {
			partly++
		}
		if _, err := Reap(t.Context(), root, testKey); err != nil {
			t.Error(err)
		}
		if left := remains(t, root, link); len(left) != 0 {
			t.Errorf("left %v", left)
		}
	}
	t.Logf("%d of 6 reapers were killed half way", partly)
}

// WaitDead waits for a dying shim, and KillShim helps one along.
func TestWaitDeadAndKillShim(t *testing.T) {
	root := t.TempDir()
	if err := errors.Join(WaitDead(t.Context(), root, testKey), KillShim(t.Context(), root, testKey)); err != nil {
		t.Errorf("no such sandbox: %v", err)
	}
	own := create(t, root)
	if err := KillShim(t.Context(), root, testKey); !errors.Is(err, ErrAlive) {
		t.Errorf("KillShim of this process: %v", err)
	}
	if err := own.Close(); err != nil {
		t.Fatal(err)
	}
	cmd, in := startVictim(t, root, 0)
	defer in.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := WaitDead(ctx, root, testKey); !errors.Is(err, ErrAlive) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("WaitDead of a live shim: %v", err)
	}
	waited := make(chan error, 1)
	go func() { waited <- WaitDead(t.Context(), root, testKey) }()
	if err := KillShim(t.Context(), root, testKey); err != nil {
		t.Error(err)
	}
	if err := <-waited; err != nil {
		t.Error(err)
	}
	reap(t, root)
	_ = cmd.Wait() // killed
}

// runVictim starts a child, waits until it is at the point, kills it and says where it was.
func runVictim(t *testing.T, root string, point int) string {
	t.Helper()
	cmd, in := startVictim(t, root, point)
	defer in.Close()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	return in.at
}

// victimStdin keeps a victim blocked; at is where it is.
type victimStdin struct {
	io.Closer
	at string
}

// startVictim starts a child and waits until it is at the point.
func startVictim(t *testing.T, root string, point int) (*exec.Cmd, victimStdin) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "LEDGER_TEST_CHILD="+root, "LEDGER_TEST_POINT="+itoa(point))
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s, _ := bufio.NewReader(out).ReadString('\n')
	s = strings.TrimSpace(s)
	what, ok := strings.CutPrefix(s, "reached: ")
	if !ok && s != "end" {
		_ = cmd.Wait()
		t.Fatalf("child: %q", s)
	}
	return cmd, victimStdin{Closer: in, at: what}
}

// remains lists what a victim has left on the machine.
func remains(t *testing.T, root, link string) (out []string) {
	t.Helper()
	list, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		out = append(out, e.Name())
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for range strings.Count(string(mounts), escapeMount(root)) {
		out = append(out, "mount")
	}
	if _, err := net.InterfaceByName(link); err == nil {
		out = append(out, "link")
	}
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range loops {
		if b, err := os.ReadFile(l); err == nil && strings.HasPrefix(string(b), root+"/") {
			out = append(out, "loop")
		}
	}
	for _, d := range cgroupDirs(link) {
		if _, err := os.Lstat(d); err == nil {
			out = append(out, d)
		}
	}
	return append(out, sleepers(t)...)
}

// sleepers finds processes by the arguments that only victims give. A zombie has
// none, so what a dead parent never collected is not counted.
func sleepers(t *testing.T) (out []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, _ := os.ReadFile(f)
		if slices.Contains([]string{"sleep\x0086399\x00", "sleep\x0086398\x00"}, string(b)) {
			out = append(out, "process "+f)
		}
	}
	return out
}

// A tree with a mount below is not removed past the mount.
func TestDirStopsAtMounts(t *testing.T) {
	root := t.TempDir()
	dir, precious := root+"/dir", root+"/precious"
	for _, d := range []string{dir + "/mnt", precious} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(precious+"/data", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// A bind mount of the same file system: the device number does not tell.
	if err := unix.Mount(precious, dir+"/mnt", "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if err := removeTree(dir); err == nil || !strings.Contains(err.Error(), "is a mount point") {
		t.Errorf("removeTree = %v", err)
	}
	if _, err := os.Lstat(precious + "/data"); err != nil {
		t.Error(err)
	}
	if err := unmount(dir + "/mnt"); err != nil {
		t.Fatal(err)
	}
	if err := removeTree(dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(dir); err == nil {
		t.Error("not removed")
	}
}

// The reaper does not kill itself, and a path that is no cgroup is refused.
func TestCgroupRefusals(t *testing.T) {
	if err := RemoveCgroup(t.Context(), t.TempDir()); err == nil || !strings.Contains(err.Error(), "another file system") {
		t.Errorf("a plain directory: %v", err)
	}
	dir := cgroupDirs("kl" + itoa(os.Getpid()))[0]
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	self := []byte(itoa(os.Getpid()))
	if err := os.WriteFile(dir+"/cgroup.procs", self, 0); err != nil {
		t.Fatal(err)
	}
	err := RemoveCgroup(t.Context(), dir)
	if back := os.WriteFile(filepath.Dir(dir)+"/cgroup.procs", self, 0); back != nil {
		t.Fatal(back)
	}
	if err == nil || !strings.Contains(err.Error(), "itself") {
		t.Errorf("own cgroup: %v", err)
	}
	if err := RemoveCgroup(t.Context(), dir); err != nil {
		t.Error(err)
	}
}

// Only the filters of the recorded priority go: the qdisc and the rest are somebody else's.
func TestFilter(t *testing.T) {
	name := "klf" + itoa(os.Getpid())
	const ingress = 0xffff0000
	count := func(h *netlink.Handle, l netlink.Link) map[uint16]int {
		list, err := h.FilterList(l, ingress)
		if err != nil {
			t.Fatal(err)
		}
		out := map[uint16]int{}
		for _, f := range list {
			out[f.Attrs().Priority]++
		}
		return out
	}
	err := inNetNS("", func(h *netlink.Handle) error {
		if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}); err != nil {
			return err
		}
		l, err := h.LinkByName(name)
		if err != nil {
			return err
		}
		attrs := netlink.QdiscAttrs{LinkIndex: l.Attrs().Index, Parent: netlink.HANDLE_INGRESS, Handle: netlink.MakeHandle(0xffff, 0)}
		if err := h.QdiscAdd(&netlink.Ingress{QdiscAttrs: attrs}); err != nil {
			return err
		}
		for _, prio := range []uint16{100, 200} {
			a := netlink.FilterAttrs{LinkIndex: l.Attrs().Index, Parent: ingress, Priority: prio, Protocol: unix.ETH_P_ALL}
			if err := h.FilterAdd(&netlink.U32{FilterAttrs: a, RedirIndex: l.Attrs().Index}); err != nil {
				return err
			}
		}
		if c := count(h, l); c[100] == 0 || c[200] == 0 {
			t.Fatalf("filters %v before", c)
		}
		for range 2 {
			if err := undo(t.Context(), Filter("", name, ingress, 100)); err != nil {
				t.Error(err)
			}
		}
		if c := count(h, l); c[100] != 0 || c[200] == 0 {
			t.Errorf("filters by priority %v, want those of 200 only", c)
		}
		return nil
	})
	if err := undo(t.Context(), Link("", name)); err != nil {
		t.Error(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range []Entry{Link("", name), Ingress("", name), Filter("", name, ingress, 1), Link("/run/netns/none", "x")} {
		if err := undo(t.Context(), e); err != nil {
			t.Errorf("%s that does not exist: %v", e, err)
		}
	}
}

// A parent goes when nothing is in it, and only then.
func TestCgroupParent(t *testing.T) {
	for _, dir := range cgroupDirs("kp" + itoa(os.Getpid())) {
		if err := os.MkdirAll(dir+"/pod", 0o755); err != nil {
			t.Fatal(err)
		}
		for _, there := range []bool{true, false, false} {
			if err := undo(t.Context(), CgroupParent(dir)); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(dir); (err == nil) != there {
				t.Errorf("%s: %v; want it there: %v", dir, err, there)
			}
			os.Remove(dir + "/pod")
		}
	}
	if err := undo(t.Context(), CgroupParent(t.TempDir())); err == nil || !strings.Contains(err.Error(), "another file system") {
		t.Errorf("no cgroup: %v", err)
	}
}
