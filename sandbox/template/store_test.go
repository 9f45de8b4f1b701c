// SPDX-License-Identifier: Apache-2.0

package template

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const memorySize = 4 << 20

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fill is what a saved machine has in its memory: two islands, one across a
// boundary of what is read at a time.
func fill(f *os.File) error {
	for off, text := range map[int64]string{5000: "kernel", chunk - 3: "across", memorySize - page: "last"} {
		if _, err := f.WriteAt([]byte(text), off); err != nil {
			return err
		}
	}
	_, err := f.WriteAt(make([]byte, 3*page), 2<<20) // zeros that were written
	return err
}

func save(_ context.Context, _ string, memory, state *os.File) error {
	if _, err := state.WriteString("devices"); err != nil {
		return err
	}
	return fill(memory)
}

func testKey(more string) Key {
	var k Key
	k.Add("test", more)
	return k
}

// made is a store with one template.
func made(t *testing.T) (*Store, *Template) {
	t.Helper()
	s := &Store{Dir: filepath.Join(t.TempDir(), "templates")}
	k := testKey("a")
	must(t, s.Make(context.Background(), k, memorySize, save))
	tpl, err := s.Open(k.Digest())
	must(t, err)
	return s, tpl
}

func content(t *testing.T, f *os.File) []byte {
	t.Helper()
	b := make([]byte, memorySize)
	_, err := f.ReadAt(b, 0)
	must(t, err)
	return b
}

func wantMemory(t *testing.T) []byte {
	t.Helper()
	f, err := NewMemory(memorySize)
	must(t, err)
	defer f.Close()
	must(t, fill(f))
	return content(t, f)
}

func TestMake(t *testing.T) {
	s, tpl := made(t)
	must(t, tpl.Verify())
	if tpl.MemoryStored == 0 || tpl.MemoryStored > 64<<10 {
		t.Errorf("the memory file holds %d bytes: want the four pages that are not zero", tpl.MemoryStored)
	}
	st, err := tpl.State()
	must(t, err)
	defer st.Close()
	b := make([]byte, 100)
	n, _ := st.Read(b)
	if string(b[:n]) != "devices" {
		t.Errorf("state is %q", b[:n])
	}
	err = s.Make(context.Background(), tpl.Key, memorySize, func(context.Context, string, *os.File, *os.File) error {
		t.Error("a template that is whole was made again")
		return nil
	})
	must(t, err)
	if _, err := s.Open(testKey("b").Digest()); !errdefs.IsNotFound(err) {
		t.Errorf("a template of another key: %v", err)
	}
}

func TestMakeFails(t *testing.T) {
	s := &Store{Dir: filepath.Join(t.TempDir(), "templates")}
	why := errors.New("no memory")
	err := s.Make(context.Background(), testKey("a"), memorySize, func(context.Context, string, *os.File, *os.File) error { return why })
	if !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
	left, err := filepath.Glob(filepath.Join(s.Dir, "*"))
	must(t, err)
	hidden, err := filepath.Glob(filepath.Join(s.Dir, ".*"))
	must(t, err)
	for _, name := range append(left, hidden...) {
		if !strings.HasSuffix(name, lockSuffix) {
			t.Errorf("left: %s", name)
		}
	}
	unlock, err := s.lock(testKey("a").Digest(), false)
	must(t, err)
	defer unlock()
	if err := s.Make(context.Background(), testKey("a"), memorySize, save); !errors.Is(err, ErrBusy) {
		t.Errorf("while another makes it: %v", err)
	}
}

// A tmpfs that is full is the maker's error, and leaves nothing in it.
func TestMakeOnFullTmpfs(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounts")
	}
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8k,mode=700"))
	defer func() { must(t, unix.Unmount(dir, 0)) }()
	s := &Store{Dir: dir}
	if err := s.Make(context.Background(), testKey("a"), memorySize, save); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("got %v, want ENOSPC", err)
	}
	if _, err := s.Open(testKey("a").Digest()); !errdefs.IsNotFound(err) {
		t.Errorf("after it failed: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, newPrefix+"*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestBroken(t *testing.T) {
	for name, harm := range map[string]func(dir string) error{
		"memory truncated":   func(d string) error { return os.Truncate(filepath.Join(d, memoryFile), memorySize/2) },
		"memory written":     func(d string) error { return scribble(filepath.Join(d, memoryFile)) },
		"memory gone":        func(d string) error { return os.Remove(filepath.Join(d, memoryFile)) },
		"state changed":      func(d string) error { return rewrite(filepath.Join(d, stateFile), "DEVICES") },
		"state truncated":    func(d string) error { return os.Truncate(filepath.Join(d, stateFile), 3) },
		"manifest gone":      func(d string) error { return os.Remove(filepath.Join(d, manifestFile)) },
		"manifest not JSON":  func(d string) error { return rewrite(filepath.Join(d, manifestFile), "x") },
		"of another version": func(d string) error { return edit(filepath.Join(d, manifestFile), `"version": 2`, `"version": 1`) },
		"of another key":     func(d string) error { return edit(filepath.Join(d, manifestFile), `"value": "a"`, `"value": "b"`) },
	} {
		t.Run(name, func(t *testing.T) {
			s, tpl := made(t)
			must(t, harm(tpl.dir))
			if _, err := s.Open(tpl.Digest); err == nil || errdefs.IsNotFound(err) {
				t.Fatalf("Open: %v, want what is wrong", err)
			}
			must(t, s.Make(context.Background(), tpl.Key, memorySize, save))
			again, err := s.Open(tpl.Digest)
			must(t, err)
			must(t, again.Verify())
		})
	}
}

func scribble(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte("K"), 5000)
	return errors.Join(err, f.Close())
}

func rewrite(path, text string) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text), 0o400)
}

func edit(path, from, to string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if !strings.Contains(string(b), from) {
		return fmt.Errorf("%s has no %s", path, from)
	}
	return rewrite(path, strings.ReplaceAll(string(b), from, to))
}

// Open does not read the memory, Verify does.
func TestVerify(t *testing.T) {
	_, tpl := made(t)
	must(t, scribble(filepath.Join(tpl.dir, memoryFile)))
	if err := tpl.Verify(); err == nil {
		t.Error("a changed byte was not noticed")
	}
}

// What is changed after a template was opened is noticed when its memory is loaded.
func TestChangedMeanwhile(t *testing.T) {
	for name, harm := range map[string]func(path string) error{
		"truncated": func(path string) error { return os.Truncate(path, page) }, "written": scribble, "gone": os.Remove,
	} {
		_, tpl := made(t)
		must(t, harm(filepath.Join(tpl.dir, memoryFile)))
		if m, err := tpl.Shared(t.Context()); err == nil {
			t.Errorf("%s: %v is shared", name, m.File.Name())
		}
		c, err := tpl.Copy()
		if err == nil {
			err = errors.Join(c.Wait(t.Context()), c.Close())
		}
		if err == nil {
			t.Errorf("%s: it was copied", name)
		}
		if users := tpl.Users(); len(users) != 0 {
			t.Errorf("%s: %v still use it", name, users)
		}
	}
}

// There are only so many templates: the oldest that nobody uses goes, and one
// of which no machine can start any more.
func TestRoom(t *testing.T) {
	s := newStore(t)
	make1 := func(k Key) *Template {
		must(t, s.Make(t.Context(), k, memorySize, save))
		tpl, err := s.Open(k.Digest())
		must(t, err)
		return tpl
	}
	used, err := make1(testKey("used")).Shared(t.Context())
	must(t, err)
	defer used.Close()
	kernel := filepath.Join(t.TempDir(), "kernel")
	must(t, os.WriteFile(kernel, nil, 0o600))
	var stale Key
	must(t, stale.AddFile("kernel", kernel))
	make1(stale)
	must(t, os.Remove(kernel))
	for i := range maxTemplates + 2 {
		make1(testKey(fmt.Sprint(i)))
	}
	for _, c := range []struct {
		k    Key
		gone bool
	}{{testKey("used"), false}, {stale, true}, {testKey("0"), true}, {testKey("1"), true}, {testKey("2"), false}, {testKey(fmt.Sprint(maxTemplates + 1)), false}} {
		if _, err := s.Open(c.k.Digest()); errdefs.IsNotFound(err) != c.gone {
			t.Errorf("%v: %v; gone is to be %v", c.k, err, c.gone)
		}
	}
}

func TestClear(t *testing.T) {
	s, tpl := made(t)
	must(t, os.Mkdir(filepath.Join(s.Dir, newPrefix+testKey("killed").Digest()), 0o700))
	removed, err := s.Clear(func(string) bool { return false })
	must(t, err)
	if len(removed) != 0 {
		t.Errorf("removed %v", removed)
	}
	if left, _ := filepath.Glob(filepath.Join(s.Dir, newPrefix+"*")); len(left) > 0 {
		t.Errorf("what a killed maker left is still there: %v", left)
	}
	removed, err = s.Clear(func(string) bool { return true })
	must(t, err)
	if len(removed) != 1 || removed[0] != tpl.Digest {
		t.Errorf("removed %v", removed)
	}
	left, err := os.ReadDir(s.Dir)
	must(t, err)
	if len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestStale(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kernel")
	must(t, os.WriteFile(path, []byte("1"), 0o600))
	var k Key
	k.Add("build", "1")
	must(t, k.AddFile("kernel", path))
	if k.Stale() {
		t.Error("stale although nothing has changed")
	}
	must(t, rewrite(path, "2"))
	if !k.Stale() {
		t.Error("not stale although the kernel is another")
	}
	var now Key
	now.Add("build", "1")
	must(t, now.AddFile("kernel", path))
	if now.Digest() == k.Digest() {
		t.Error("two kernels, one digest")
	}
}

// Clones share one sealed file as long as one of them has it.
func TestShared(t *testing.T) {
	s, tpl := made(t)
	a, err := tpl.Shared(t.Context())
	must(t, err)
	b, err := tpl.Shared(t.Context())
	must(t, err)
	ia, err := inode(a.File)
	must(t, err)
	ib, err := inode(b.File)
	must(t, err)
	if ia != ib {
		t.Error("the second clone has loaded the memory again")
	}
	want := wantMemory(t)
	if !bytes.Equal(content(t, b.File), want) {
		t.Error("the memory is not what was saved")
	}
	if _, err := b.File.WriteAt([]byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("write to the shared memory: %v", err)
	}
	if err := unix.Fallocate(int(b.File.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, page); !errors.Is(err, unix.EPERM) {
		t.Errorf("punch a hole into the shared memory: %v", err)
	}
	m, err := unix.Mmap(int(b.File.Fd()), 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	must(t, err)
	m[0] = 1 // a clone's own
	must(t, unix.Munmap(m))
	if got := tpl.Users(); len(got) != 1 || got[0] != os.Getpid() {
		t.Errorf("users %v, want this process", got)
	}
	must(t, a.Close())
	_, err = s.Clear(func(string) bool { return true }) // the last one goes on
	must(t, err)
	if !bytes.Equal(content(t, b.File), want) {
		t.Error("the memory is not what was saved any more")
	}
	must(t, b.Close())
}

// A process that holds the lock and does not go on stops no pod.
func TestSharedWhileLocked(t *testing.T) {
	s, tpl := made(t)
	unlock, err := s.lock(tpl.Digest, false)
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if m, err := tpl.Shared(ctx); !errors.Is(err, ErrBusy) || !errors.Is(err, context.Canceled) {
		t.Errorf("memory %v, error %v, want ErrBusy", m, err)
	}
	unlock()
	m, err := tpl.Shared(t.Context()) // the wait that was given up holds nothing
	must(t, err)
	must(t, m.Close())
}

// An entry of a process that has gone, or that leads elsewhere, is not followed.
func TestSharedStaleEntries(t *testing.T) {
	_, tpl := made(t)
	other, err := NewMemory(memorySize)
	must(t, err)
	defer other.Close()
	unsealed := filepath.Join(tpl.dir, "live", fmt.Sprintf("%d-%d", os.Getpid(), other.Fd()))
	must(t, writeEntry(unsealed, other))
	for name, text := range map[string]string{"999999999-3": "1:1 1", "x": "", fmt.Sprintf("%d-0", os.Getpid()): "1:1 1"} {
		must(t, os.WriteFile(filepath.Join(tpl.dir, "live", name), []byte(text), 0o600))
	}
	m, err := tpl.Shared(t.Context())
	must(t, err)
	if !bytes.Equal(content(t, m.File), wantMemory(t)) {
		t.Error("the memory is not what was saved")
	}
	must(t, m.Close())
	left, err := os.ReadDir(filepath.Join(tpl.dir, "live"))
	must(t, err)
	if len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestCopy(t *testing.T) {
	_, tpl := made(t)
	c, err := tpl.Copy()
	must(t, err)
	defer c.Close()
	must(t, c.Wait(t.Context()))
	f := c.File
	if !bytes.Equal(content(t, f), wantMemory(t)) {
		t.Error("the copy is not what was saved")
	}
	_, err = f.WriteAt([]byte("x"), 0)
	must(t, err)
	must(t, tpl.Verify())
}
