// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/sandbox/storage/storagetest"
)

func TestMain(m *testing.M) { os.Exit(storagetest.Main(m)) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, path, content string) string {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, []byte(content), 0o644))
	return path
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	must(t, err)
	return string(data)
}

func newShare(t *testing.T) *Share {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "shared")
	s, err := NewShare(dir, nil, slog.Default())
	must(t, err)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the share's directory is left: %v", err)
		}
		if left := storagetest.Mounts(t, dir); len(left) > 0 {
			t.Errorf("mounts are left: %v", left)
		}
	})
	return s
}

// onHost is a guest path's place on the host.
func (s *Share) onHost(t *testing.T, guest string) string {
	t.Helper()
	rel, ok := strings.CutPrefix(guest, protocols.GuestSharedDir+"/")
	if !ok {
		t.Fatalf("guest path %q is not below %s", guest, protocols.GuestSharedDir)
	}
	return filepath.Join(s.Dir(), rel)
}

// noContainer checks that nothing of a container is in the share.
func (s *Share) noContainer(t *testing.T, id string) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(s.Dir(), id+"*"))
	must(t, err)
	mounts := storagetest.Mounts(t, s.Dir())
	mounts = slices.DeleteFunc(mounts, func(m string) bool {
		return !strings.HasPrefix(filepath.Base(m), id) && !strings.Contains(m, "/"+id+"/")
	})
	if len(left) > 0 || len(mounts) > 0 {
		t.Errorf("left of %s: files %v, mounts %v", id, left, mounts)
	}
}

func TestParseOptions(t *testing.T) {
	for _, c := range []struct {
		in    string
		flags uintptr
		data  string
	}{
		{"", 0, ""},
		{"ro", unix.MS_RDONLY, ""},
		{"ro,rw", 0, ""},
		{"rw,ro", unix.MS_RDONLY, ""},
		{"rbind,nosuid,nodev,noexec", unix.MS_BIND | unix.MS_REC | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"bind", unix.MS_BIND, ""},
		{"nosuid,suid,nodev,dev,noexec,exec", 0, ""},
		{"defaults,async,relatime", unix.MS_RELATIME, ""},
		{"relatime,norelatime,strictatime", unix.MS_STRICTATIME, ""},
		{"noatime,nodiratime,sync,dirsync", unix.MS_NOATIME | unix.MS_NODIRATIME | unix.MS_SYNCHRONOUS | unix.MS_DIRSYNC, ""},
		{"lowerdir=/a:/b,ro,volatile,index=off", unix.MS_RDONLY, "lowerdir=/a:/b,volatile,index=off"},
		{"size=1m,mode=1777", 0, "size=1m,mode=1777"},
		{"RO", 0, "RO"},
	} {
		var in []string
		if c.in != "" {
			in = strings.Split(c.in, ",")
		}
		flags, data := parseOptions(in)
		if flags != c.flags || strings.Join(data, ",") != c.data {
			t.Errorf("%q: %#x %q; want %#x %q", c.in, flags, data, c.flags, c.data)
		}
	}
}

func TestShorten(t *testing.T) {
	for _, c := range []struct {
		in, out []string
		dir     string
	}{
		{[]string{"lowerdir=/s/1/fs:/s/2/fs"}, []string{"lowerdir=1/fs:2/fs"}, "/s"},
		{[]string{"lowerdir=/s/1:/s/10", "upperdir=/s/u", "workdir=/s/w"}, []string{"lowerdir=1:10", "upperdir=/s/u", "workdir=/s/w"}, "/s"},
		{[]string{"index=off", "lowerdir=/a/x:/b/x"}, []string{"index=off", "lowerdir=a/x:b/x"}, "/"},
		{[]string{"lowerdir=/var/lib/a:/var/libx/b"}, []string{"lowerdir=lib/a:libx/b"}, "/var"},
		{[]string{"lowerdir=/s/only"}, []string{"lowerdir=only"}, "/s"},
		{[]string{"size=1"}, []string{"size=1"}, ""},
	} {
		dir, out := shorten(c.in)
		if dir != c.dir || !reflect.DeepEqual(out, c.out) {
			t.Errorf("%q: %q %q; want %q %q", c.in, dir, out, c.dir, c.out)
		}
	}
}

func TestInside(t *testing.T) {
	root, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	must(t, os.MkdirAll(filepath.Join(root, "a", "b"), 0o755))
	must(t, os.Symlink("/etc", filepath.Join(root, "out")))
	must(t, os.Symlink("a", filepath.Join(root, "in")))
	must(t, os.Symlink(root+"x", filepath.Join(root, "sibling")))
	must(t, os.Mkdir(root+"x", 0o755))
	t.Cleanup(func() { os.Remove(root + "x") })
	for rel, want := range map[string]string{
		"a/b": "a/b", "/a/b": "a/b", "in/b": "a/b", "../a": "a", "a/../../a": "a", ".": "",
		"out": "!", "out/passwd": "!", "sibling": "!", "missing": "!",
	} {
		got, err := inside(root, rel)
		if want == "!" {
			if err == nil {
				t.Errorf("%q: %q; want an error", rel, got)
			}
			continue
		}
		if err != nil || got != filepath.Join(root, want) {
			t.Errorf("%q: %q, %v; want %q", rel, got, err, want)
		}
	}
}

func TestRootfs(t *testing.T) {
	s := newShare(t)
	src := t.TempDir()
	write(t, src+"/lower/etc/name", "lower")
	write(t, src+"/bundle/rootfs/file", "bundle")
	must(t, os.MkdirAll(src+"/upper", 0o755))
	must(t, os.MkdirAll(src+"/work", 0o755))

	guest, err := s.Rootfs("c1", nil, src+"/bundle/rootfs")
	must(t, err)
	if got := read(t, s.onHost(t, guest)+"/file"); got != "bundle" {
		t.Errorf("a bundle's root: %q", got)
	}
	guest, err = s.Rootfs("c2", []Mount{{Type: "overlay", Source: "overlay",
		Options: []string{"lowerdir=" + src + "/lower", "upperdir=" + src + "/upper", "workdir=" + src + "/work"}}}, "")
	must(t, err)
	write(t, s.onHost(t, guest)+"/etc/name", "written")
	if got := read(t, src+"/upper/etc/name"); got != "written" {
		t.Errorf("upper layer: %q", got)
	}
	// Several mounts, one below another's root; the second one is read-only.
	guest, err = s.Rootfs("c3", []Mount{
		{Type: "bind", Source: src + "/lower", Options: []string{"rbind", "rw"}},
		{Type: "bind", Source: src + "/bundle", Target: "/etc", Options: []string{"rbind", "ro"}},
	}, "")
	must(t, err)
	if got := read(t, s.onHost(t, guest)+"/etc/rootfs/file"); got != "bundle" {
		t.Errorf("nested mount: %q", got)
	}
	if err := os.WriteFile(s.onHost(t, guest)+"/etc/new", nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("write to a read-only mount: %v", err)
	}
	for _, id := range []string{"c1", "c2", "c3"} {
		must(t, s.Remove(id))
		must(t, s.Remove(id)) // again
		s.noContainer(t, id)
	}
	if got := read(t, src+"/bundle/rootfs/file"); got != "bundle" {
		t.Errorf("the source after Remove: %q", got)
	}
}

func TestRootfsFailureLeavesNothing(t *testing.T) {
	s := newShare(t)
	src := t.TempDir()
	must(t, os.Mkdir(src+"/root", 0o755))
	must(t, os.Symlink("/", src+"/root/escape"))
	good := Mount{Type: "bind", Source: src + "/root", Options: []string{"rbind"}}
	for name, mounts := range map[string][]Mount{
		"source":    {{Type: "bind", Source: src + "/missing", Options: []string{"rbind"}}},
		"type":      {{Type: "nosuchfs", Source: "x"}},
		"second":    {good, {Type: "nosuchfs", Source: "x"}},
		"leads out": {good, {Type: "bind", Source: src, Target: "escape/tmp", Options: []string{"bind"}}},
	} {
		if guest, err := s.Rootfs("c1", mounts, ""); err == nil {
			t.Errorf("%s: %s; want an error", name, guest)
		}
		s.noContainer(t, "c1")
	}
	if _, err := s.Rootfs("c1", []Mount{good}, ""); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// Many layers exceed the page that mount(2) takes.
func TestManyLayers(t *testing.T) {
	s := newShare(t)
	base := t.TempDir()
	var layers []string
	for i := range 60 {
		dir := fmt.Sprintf("%s/snapshots/with-a-rather-long-directory-name/%03d/fs", base, i)
		write(t, fmt.Sprintf("%s/file%d", dir, i), fmt.Sprint(i))
		layers = append(layers, dir)
	}
	option := "lowerdir=" + strings.Join(layers, ":")
	if len(option) <= os.Getpagesize() {
		t.Fatalf("%d bytes of options do not exceed a page", len(option))
	}
	wd, err := os.Getwd()
	must(t, err)
	guest, err := s.Rootfs("c1", []Mount{{Type: "overlay", Source: "overlay", Options: []string{option}}}, "")
	must(t, err)
	for _, i := range []int{0, 30, 59} {
		if got := read(t, fmt.Sprintf("%s/file%d", s.onHost(t, guest), i)); got != fmt.Sprint(i) {
			t.Errorf("layer %d: %q", i, got)
		}
	}
	if now, err := os.Getwd(); err != nil || now != wd {
		t.Errorf("working directory %s, %v; was %s", now, err, wd)
	}
}

func TestBind(t *testing.T) {
	s := newShare(t)
	src := t.TempDir()
	file := write(t, src+"/dir/file", "content")
	must(t, os.Mkdir(src+"/dir/sub", 0o755))
	must(t, unix.Mount("tmpfs", src+"/dir/sub", "tmpfs", 0, ""))
	t.Cleanup(func() { unix.Unmount(src+"/dir/sub", unix.MNT_DETACH) })
	write(t, src+"/dir/sub/below", "mounted")
	l, err := net.Listen("unix", src+"/sock")
	must(t, err)
	defer l.Close()

	bind := func(i int, source string, recursive, readonly bool) string {
		t.Helper()
		guest, err := s.Bind("c1", i, source, BindOptions{Recursive: recursive, ReadOnly: readonly})
		must(t, err)
		return s.onHost(t, guest)
	}
	rw := bind(0, file, false, false)
	write(t, rw, "changed")
	if got := read(t, file); got != "changed" {
		t.Errorf("the source after a write: %q", got)
	}
	ro := bind(1, file, false, true)
	if err := os.WriteFile(ro, nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("write to a read-only file: %v", err)
	}
	flat, deep := bind(2, src+"/dir", false, false), bind(3, src+"/dir", true, false)
	if _, err := os.Stat(flat + "/sub/below"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a bind that is not recursive shows what is mounted below: %v", err)
	}
	if got := read(t, deep+"/sub/below"); got != "mounted" {
		t.Errorf("recursive bind: %q", got)
	}
	if err := os.WriteFile(bind(5, src+"/dir", true, true)+"/sub/below", nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("write below a recursive read-only bind: %v", err)
	}
	write(t, deep+"/sub/below", "mounted") // the others are not
	c, err := net.Dial("unix", bind(4, src+"/sock", false, false))
	if err != nil {
		t.Errorf("a socket in the share: %v", err)
	} else {
		c.Close()
	}
	must(t, s.Remove("c1"))
	s.noContainer(t, "c1")
	if got := read(t, src+"/dir/sub/below"); got != "mounted" {
		t.Errorf("the source's own mount after Remove: %q", got)
	}
}

// What containers mount in the same way is in the share once, until its last user has
// gone; what they mount in another way, or what has been replaced, is another.
func TestBindPod(t *testing.T) {
	s := newShare(t)
	src := t.TempDir()
	bind := func(container, source string, how BindOptions) string {
		t.Helper()
		path, err := s.BindPod(container, source, how)
		must(t, err)
		return path
	}
	first := bind("c1", src, BindOptions{Recursive: true})
	write(t, s.onHost(t, first)+"/file", "x")
	again := bind("c2", src, BindOptions{Recursive: true})
	if again != first || !s.Holds("c2") {
		t.Errorf("%s, again %s, held %v", first, again, s.Holds("c2"))
	}
	for path, what := range map[string]string{
		bind("c1", t.TempDir(), BindOptions{Recursive: true}):         "another directory",
		bind("c1", src, BindOptions{Recursive: true, Private: true}):  "private",
		bind("c1", src, BindOptions{Recursive: true, ReadOnly: true}): "read-only",
		bind("c1", src, BindOptions{}):                                "not recursive",
		bind("c1", src+"/file", BindOptions{Recursive: true}):         "a file in it",
	} {
		if path == first {
			t.Errorf("%s: %s, want one of its own", what, path)
		}
	}
	must(t, s.Remove("c1"))
	if got := read(t, s.onHost(t, again)+"/file"); got != "x" {
		t.Errorf("after the first container: %q", got)
	}
	must(t, os.Rename(src, src+".was"))
	must(t, os.MkdirAll(src+"/a b", 0o755))
	fresh := bind("c3", src, BindOptions{Recursive: true})
	must(t, unix.Mount("tmpfs", src+"/a b", "tmpfs", 0, ""))
	t.Cleanup(func() { unix.Unmount(src+"/a b", unix.MNT_DETACH) })
	below := bind("c3", src, BindOptions{Recursive: true})
	if fresh == first || below == fresh || bind("c3", src, BindOptions{Recursive: true}) != below {
		t.Errorf("first %s, replaced %s, with a mount below %s", first, fresh, below)
	}
	must(t, s.Remove("c3"))
	must(t, s.Remove("c2"))
	s.noContainer(t, protocols.PodSharePrefix)
	missing := t.TempDir() + "/later"
	if _, err := s.BindPod("c3", missing, BindOptions{}); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), missing) {
		t.Errorf("one that is missing: %v", err)
	}
	must(t, os.Mkdir(missing, 0o755))
	bind("c3", missing, BindOptions{})
}

func TestBindRefuses(t *testing.T) {
	s := newShare(t)
	fifo := filepath.Join(t.TempDir(), "fifo")
	must(t, unix.Mkfifo(fifo, 0o600))
	for source, want := range map[string]string{fifo: "only directories", "/dev/null": "only directories", "/nonexistent/x": "no such file"} {
		if _, err := s.Bind("c1", 0, source, BindOptions{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %q", source, err, want)
		}
	}
	s.noContainer(t, "c1")
}

// A container's id that begins like another's is another.
func TestRemoveTakesOneContainerOnly(t *testing.T) {
	s := newShare(t)
	file := write(t, t.TempDir()+"/file", "x")
	for _, id := range []string{"a", "a-0"} {
		_, err := s.Rootfs(id, nil, filepath.Dir(file))
		must(t, err)
	}
	one, err := s.Bind("a-0", 7, file, BindOptions{})
	must(t, err)
	must(t, s.Remove("a"))
	if got := read(t, s.onHost(t, one)); got != "x" {
		t.Errorf("the other container's mount: %q", got)
	}
}

func TestClosedShareTakesNothing(t *testing.T) {
	s, err := NewShare(filepath.Join(t.TempDir(), "shared"), nil, slog.Default())
	must(t, err)
	dir := t.TempDir()
	_, err = s.Rootfs("c1", nil, dir)
	must(t, err)
	must(t, s.Close())
	if _, err := s.Rootfs("c2", nil, dir); err == nil {
		t.Error("Rootfs after Close: no error")
	}
	if _, err := s.Bind("c2", 0, dir, BindOptions{}); err == nil {
		t.Error("Bind after Close: no error")
	}
	if _, err := os.Stat(s.Dir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the share's directory is back: %v", err)
	}
}

// What is mounted in the share later appears in a namespace made before: the
// daemon's, which unshares when it starts.
func TestShareIsAPeer(t *testing.T) {
	s := newShare(t)
	data := read(t, "/proc/self/mountinfo")
	for _, line := range strings.Split(data, "\n") {
		if f := strings.Fields(line); len(f) > 6 && f[4] == s.Dir() {
			if !strings.HasPrefix(f[6], "shared:") {
				t.Errorf("the share's mount is not shared: %s", line)
			}
			return
		}
	}
	t.Error("the share is no mount")
}

// What is read-only is so for the daemon too, which has its own copy of every mount.
func TestReadOnlyForThePeers(t *testing.T) {
	s := newShare(t)
	peer, src := t.TempDir(), t.TempDir()
	must(t, unix.Mount(s.Dir(), peer, "", unix.MS_BIND, ""))
	t.Cleanup(func() { unix.Unmount(peer, unix.MNT_DETACH) })
	must(t, unix.Mount("", peer, "", unix.MS_SLAVE, ""))
	write(t, src+"/file", "content")
	must(t, os.Mkdir(src+"/sub", 0o755))
	must(t, unix.Mount("tmpfs", src+"/sub", "tmpfs", 0, ""))
	t.Cleanup(func() { unix.Unmount(src+"/sub", unix.MNT_DETACH) })
	for i, c := range []struct {
		recursive bool
		paths     []string
	}{{true, []string{"/file", "/sub/new"}}, {false, []string{"/file"}}} {
		guest, err := s.Bind("c1", i, src, BindOptions{Recursive: c.recursive, ReadOnly: true})
		must(t, err)
		for _, path := range c.paths {
			if err := os.WriteFile(peer+"/"+filepath.Base(guest)+path, nil, 0o600); !errors.Is(err, unix.EROFS) {
				t.Errorf("recursive %v: write to %s by way of the peer: %v", c.recursive, path, err)
			}
		}
	}
}

// A container that is removed while the machine ends is removed once, and both
// callers find it gone.
func TestRemoveAndCloseAtOnce(t *testing.T) {
	for range 30 {
		s, err := NewShare(filepath.Join(t.TempDir(), "shared"), nil, slog.Default())
		must(t, err)
		_, err = s.Rootfs("c1", nil, t.TempDir())
		must(t, err)
		errs := make(chan error, 3)
		go func() { errs <- s.Remove("c1") }()
		go func() { errs <- s.Close() }()
		go func() { errs <- s.Remove("c1") }()
		for range 3 {
			if err := <-errs; err != nil {
				t.Fatal(err)
			}
		}
		if _, err := os.Stat(s.Dir()); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("the share's directory is left: %v", err)
		}
	}
}
