// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const testKey = "0123456789abcdef"

func create(t *testing.T, root string) *Ledger {
	t.Helper()
	l, err := Create(root, testKey, Meta{Sandbox: "pod1", Namespace: "ns", Bundle: "/b"})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// kill drops the ledger as a SIGKILL would.
func kill(t *testing.T, l *Ledger) {
	t.Helper()
	if err := l.Release(); err != nil {
		t.Fatal(err)
	}
}

func reap(t *testing.T, root string) Report {
	t.Helper()
	r, err := Reap(t.Context(), root, testKey)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(filepath.Join(root, testKey)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory is still there: %v", err)
	}
	return r
}

func TestKey(t *testing.T) {
	// printf /run/x/ns/id | sha256sum
	const want = "9c61f5663c9e78c2"
	for _, p := range []string{"/run/x/ns/id", "/run/x/ns/id/", "/run//x/ns/../ns/id"} {
		if got := Key(p); got != want {
			t.Errorf("Key(%q) = %s, want %s", p, got, want)
		}
	}
}

func TestLife(t *testing.T) {
	root := filepath.Join(t.TempDir(), "state")
	if r, err := Reap(t.Context(), root, testKey); err != nil || len(r.Removed) != 0 {
		t.Errorf("Reap of nothing = %v, %v", r, err)
	}
	l := create(t, root)
	if _, err := Create(root, testKey, Meta{}); !errors.Is(err, ErrExists) {
		t.Errorf("second Create: %v", err)
	}
	if _, err := Reap(t.Context(), root, testKey); !errors.Is(err, ErrAlive) {
		t.Errorf("Reap of a live sandbox: %v", err)
	}
	tok, err := l.Record(File(root + "/a"))
	if err != nil {
		t.Fatal(err)
	}
	list, err := List(root)
	if err != nil || len(list) != 1 || !list[0].Alive || len(list[0].Entries) != 1 || list[0].Meta.Sandbox != "pod1" || list[0].Err != nil {
		t.Fatalf("List = %+v, %v", list, err)
	}
	if m := list[0].Meta; m.Shim.PID != os.Getpid() || m.Created.IsZero() || m.Build == "" || m.Boot == "" {
		t.Errorf("meta %+v", m)
	}
	for range 2 {
		if err := l.Forget(tok); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if names, _ := os.ReadDir(root); len(names) != 0 {
		t.Errorf("left: %v", names)
	}
}

func TestCloseWithEntriesLeavesThemToReap(t *testing.T) {
	root := t.TempDir()
	l := create(t, root)
	path := root + "/a"
	if _, err := l.Record(File(path)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); !errors.Is(err, ErrNotEmpty) || !strings.Contains(err.Error(), "file "+path) {
		t.Errorf("Close = %v", err)
	}
	if r := reap(t, root); len(r.Removed) != 1 || r.Meta.Sandbox != "pod1" {
		t.Errorf("report %+v", r)
	}
	if _, err := os.Lstat(path); err == nil {
		t.Error("the file is still there")
	}
}

func TestBadEntries(t *testing.T) {
	l := create(t, t.TempDir())
	for _, e := range []Entry{
		File("/"), File("/etc"), Dir("/run"), Dir("relative/path"), Dir("/run/../etc/x"), File(""), {Kind: KindProcess, PID: 1, Start: 1},
		{Kind: KindProcess, PID: 4}, Link("", ""), Link("", "lo"), Link("rel", "tap0"),
	} {
		if _, err := l.Record(e); err == nil {
			t.Errorf("%v was accepted", e)
		}
	}
	for _, key := range []string{"", ".", "..", "a/b", ".new-1", strings.Repeat("x", 65)} {
		if _, err := Create(t.TempDir(), key, Meta{}); err == nil {
			t.Errorf("key %q was accepted", key)
		}
		if _, err := Reap(t.Context(), t.TempDir(), key); err == nil {
			t.Errorf("Reap of key %q", key)
		}
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

func TestAdopt(t *testing.T) {
	root := t.TempDir()
	l := create(t, root)
	if _, err := l.Record(File(root + "/a")); err != nil {
		t.Fatal(err)
	}
	// A torn line, as a kill in mid-write leaves it.
	if _, err := l.file.WriteString(`{"add":9,"ki`); err != nil {
		t.Fatal(err)
	}
	other, err := os.Create(filepath.Join(root, "other"))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if _, err := Adopt(root, testKey, other); err == nil {
		t.Error("a foreign lock was adopted")
	}
	stranger, err := os.OpenFile(filepath.Join(l.Dir(), lockFile), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	if _, err := Adopt(root, testKey, stranger); err == nil {
		t.Error("a lock that another description holds was adopted")
	}
	if _, err := unix.FcntlInt(l.LockFile().Fd(), unix.F_SETFD, 0); err != nil { // as a child finds it
		t.Fatal(err)
	}
	a, err := Adopt(root, testKey, l.LockFile())
	if err != nil {
		t.Fatal(err)
	}
	l.file.Close()
	if flags, err := unix.FcntlInt(a.LockFile().Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("the adopted lock is inherited by children: flags %#x, %v", flags, err)
	}
	if e := a.Entries(); len(e) != 1 || e[0].Path != root+"/a" {
		t.Fatalf("entries %v", e)
	}
	if _, err := a.Record(File(root + "/b")); err != nil {
		t.Fatal(err)
	}
	kill(t, a)
	if r := reap(t, root); len(r.Removed) != 2 || r.Removed[0].Path != root+"/b" {
		t.Errorf("removed %v, want the last first", r.Removed)
	}
}

// The lock is inherited with the descriptor and lives as long as one holder does.
func TestLockIsInherited(t *testing.T) {
	root := t.TempDir()
	l := create(t, root)
	cmd := exec.Command("sleep", "60")
	cmd.ExtraFiles = []*os.File{l.LockFile()}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill(t, l)
	_, err := Reap(t.Context(), root, testKey)
	if !errors.Is(err, ErrAlive) {
		t.Errorf("Reap while a child holds the lock: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	reap(t, root)
}

// Entries recorded by many goroutines all arrive, and the file stays readable.
func TestConcurrentRecords(t *testing.T) {
	root := t.TempDir()
	l := create(t, root)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 50 {
				tok, err := l.Record(File(root + "/a"))
				if err == nil && i%2 == 0 {
					err = l.Forget(tok)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	c, err := read(l.Dir())
	if err != nil || len(c.live) != 200 || c.last != 400 {
		t.Errorf("read back %d entries, last %d, %v", len(c.live), c.last, err)
	}
	kill(t, l)
	reap(t, root)
}

func TestGoldenVersion1(t *testing.T) {
	data, err := os.ReadFile("testdata/v1.ledger")
	if err != nil {
		t.Fatal(err)
	}
	c, err := parse(data)
	if err != nil {
		t.Fatal(err)
	}
	m := Meta{Sandbox: "pod1", Namespace: "k8s.io", Bundle: "/run/containerd/io.containerd.runtime.v2.task/k8s.io/pod1",
		Shim: Proc{PID: 4004, Start: 124}, Created: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC), Build: "0.1.0", Boot: "00000000-0000-0000-0000-000000000000"}
	if c.version != 1 || c.meta != m {
		t.Errorf("version %d meta %+v", c.version, c.meta)
	}
	const ns = "/run/netns/kata-pod1"
	want := []Entry{
		Cgroup("/sys/fs/cgroup/kata/pod1"), NetNS(ns), Link(ns, "tap0_kata"), Ingress(ns, "eth0"), Filter(ns, "eth1", 0xffff0000, 49152),
		{Kind: KindProcess, Name: "qemu", PID: 4002, Start: 456}, Mount("/run/kata-containers/mnt"), Loop("/dev/loop7", "/var/lib/kata/disk"),
		File("/run/kata-containers/f"), Socket("/run/kata-containers/s"), Dir("/run/kata-containers/d"),
	}
	if len(c.live) != len(want) {
		t.Fatalf("%d entries, want %d", len(c.live), len(want))
	}
	for i, e := range want {
		if c.live[i].Entry != e {
			t.Errorf("entry %d = %+v, want %+v", i, c.live[i].Entry, e)
		}
	}
	// Reaping it on another boot removes nothing but files.
	root := t.TempDir()
	dir := filepath.Join(root, testKey)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, ledgerFile), data, 0o600); err != nil {
		t.Fatal(err)
	}
	if r := reap(t, root); len(r.Removed) != len(want) {
		t.Errorf("removed %d of %d", len(r.Removed), len(want))
	}
}

// What a newer build wrote is left, reported and kept for that build; what is known goes.
func TestNewerVersion(t *testing.T) {
	root := t.TempDir()
	l := create(t, root)
	path := root + "/a"
	if _, err := l.Record(File(path)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := l.file.WriteString(`{"add":7,"kind":"quantum-link","path":"/x","new":{"a":1}}` + "\n"); err != nil {
		t.Fatal(err)
	}
	kill(t, l)
	for try := range 2 {
		r, err := Reap(t.Context(), root, testKey)
		if !errors.Is(err, errUnknownKind) || len(r.Left) != 1 || len(r.Removed) != 1-try {
			t.Errorf("try %d: report %+v, %v", try, r, err)
		}
	}
	if _, err := os.Lstat(path); err == nil {
		t.Error("the known entry was not undone")
	}
	if list, err := List(root); err != nil || len(list) != 1 || list[0].Alive || len(list[0].Entries) != 1 {
		t.Errorf("List = %+v, %v", list, err)
	}
}

// A format of the future is refused, and not a byte of it is touched.
func TestNewerFormat(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, testKey)
	path := root + "/a"
	text := fmt.Sprintf(`{"ledger":%d,"sandbox":"pod1","build":"9.9"}`+"\n"+`{"add":1,"kind":"file","path":%q}`+"\n"+`{"quantum":`, Version+1, path)
	for _, f := range []string{dir + "/" + ledgerFile, dir + "/" + lockFile, path} {
		if err := os.MkdirAll(filepath.Dir(f), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		_, err := Reap(t.Context(), root, testKey)
		if !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), `"9.9"`) || !strings.Contains(err.Error(), dir) {
			t.Errorf("Reap: %v; want a refusal that names the build and the directory", err)
		}
	}
	if _, err := GC(t.Context(), root); !errors.Is(err, ErrNewer) {
		t.Errorf("GC: %v", err)
	}
	for _, f := range []string{dir + "/" + ledgerFile, path} {
		if got, err := os.ReadFile(f); err != nil || string(got) != text {
			t.Errorf("%s: %q, %v", f, got, err)
		}
	}
	if list, err := List(root); err != nil || len(list) != 1 || list[0].Version != Version+1 {
		t.Errorf("List = %+v, %v", list, err)
	}
}

func TestForeignHeader(t *testing.T) {
	for _, text := range []string{"not json\n", "{}\n", `{"ledger":0}` + "\n"} {
		if _, err := parse([]byte(text)); err == nil {
			t.Errorf("%q was accepted", text)
		}
	}
	for _, text := range []string{"", `{"ledger":1,"sand`} {
		if c, err := parse([]byte(text)); err != nil || len(c.live) != 0 {
			t.Errorf("%q: %v, %v", text, c, err)
		}
	}
}

// A pid that belongs to another process by now is left alone.
func TestReusedPid(t *testing.T) {
	root := t.TempDir()
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	e, err := Process("other", cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	e.Start--
	l := create(t, root)
	if _, err := l.Record(e); err != nil {
		t.Fatal(err)
	}
	kill(t, l)
	reap(t, root)
	if _, err := StartTime(cmd.Process.Pid); err != nil {
		t.Errorf("the innocent process is gone: %v", err)
	}
}

func TestGC(t *testing.T) {
	root := t.TempDir()
	live := create(t, root)
	dead, err := Create(root, "fedcba9876543210", Meta{Sandbox: "dead"})
	if err != nil {
		t.Fatal(err)
	}
	kill(t, dead)
	for _, d := range []string{newPrefix + "1-1-x", newPrefix + "999999999-1-x", "00000000000000aa", "somebody-elses"} {
		if err := os.Mkdir(filepath.Join(root, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "somebody-elses", "f"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	start, err := StartTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	mine := filepath.Join(root, newPrefix+itoa(os.Getpid())+"-"+itoa(int(start))+"-x")
	if err := os.Mkdir(mine, 0o700); err != nil {
		t.Fatal(err)
	}
	reports, err := GC(t.Context(), root)
	if err != nil || len(reports) != 2 {
		t.Fatalf("GC = %+v, %v", reports, err)
	}
	names, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, n := range names {
		left = append(left, n.Name())
	}
	if want := filepath.Base(mine) + " " + testKey + " somebody-elses"; strings.Join(left, " ") != want {
		t.Errorf("left %q, want %q", left, want)
	}
	if err := live.Close(); err != nil {
		t.Error(err)
	}
}

// Two reapers do not get into each other's way.
func TestReapersExcludeEachOther(t *testing.T) {
	root := t.TempDir()
	kill(t, create(t, root))
	f, err := lockDead(filepath.Join(root, testKey))
	if err != nil || f == nil {
		t.Fatal(err)
	}
	if _, err := Reap(t.Context(), root, testKey); !errors.Is(err, ErrBusy) {
		t.Errorf("second reaper: %v", err)
	}
	f.Close()
	reap(t, root)
	// Many at once: each ends with nil or ErrBusy, and the directory is gone.
	for range 20 {
		kill(t, create(t, root))
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				if _, err := Reap(context.WithoutCancel(t.Context()), root, testKey); err != nil && !errors.Is(err, ErrBusy) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if _, err := os.Lstat(filepath.Join(root, testKey)); err == nil {
			t.Fatal("not removed")
		}
	}
}

func BenchmarkLife(b *testing.B) {
	root := b.TempDir()
	for b.Loop() {
		l, err := Create(root, testKey, Meta{Sandbox: "pod1"})
		if err != nil {
			b.Fatal(err)
		}
		for range 10 {
			tok, err := l.Record(File(root + "/a"))
			if err == nil {
				err = l.Forget(tok)
			}
			if err != nil {
				b.Fatal(err)
			}
		}
		if err := l.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
