// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/internal/spawn"
	"github.com/kata-v2/kata/sandbox/storage/storagetest"
)

// host is a mount namespace beside this process's; its mounts are private, as
// on a machine that nobody prepared for propagation.
type host struct {
	t      *testing.T
	thread *spawn.Thread
	ns     *os.File
}

func newHost(t *testing.T) *host {
	h := &host{t: t, thread: spawn.NewThread()}
	t.Cleanup(h.thread.Close)
	must(t, h.thread.Do(func() (err error) {
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			return err
		}
		h.ns, err = os.Open(fmt.Sprintf("/proc/self/task/%d/ns/mnt", unix.Gettid()))
		return err
	}))
	t.Cleanup(func() { h.ns.Close() })
	return h
}

// do runs f in the host's namespace.
func (h *host) do(f func() error) {
	h.t.Helper()
	must(h.t, h.thread.Do(f))
}

// tmpfs mounts one at dir, with a file in it.
func (h *host) tmpfs(dir, file string) {
	h.t.Helper()
	h.do(func() error {
		return errors.Join(os.MkdirAll(dir, 0o755), unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"),
			os.WriteFile(filepath.Join(dir, file), []byte("host"), 0o644))
	})
}

func (h *host) share() *Share {
	h.t.Helper()
	s, err := NewShare(filepath.Join(h.t.TempDir(), "shared"), h.ns, slog.Default())
	must(h.t, err)
	h.t.Cleanup(func() {
		if err := s.Close(); err != nil {
			h.t.Error(err)
		}
	})
	return s
}

// A pod's container may be given what was mounted after the pod started, on a
// host whose mounts do not propagate.
func TestSourcesAreTheHostsOfNow(t *testing.T) {
	h := newHost(t)
	s := h.share()
	src := t.TempDir()
	h.tmpfs(src+"/vol/sub", "there")
	h.tmpfs(src+"/root", "etc")
	if _, err := os.Stat(src + "/vol/sub/there"); err == nil {
		t.Fatal("the host's mounts are seen here")
	}
	for i, o := range []BindOptions{{Recursive: true}, {Recursive: true, ReadOnly: true}, {Recursive: true, Private: true}} {
		guest, err := s.Bind("c1", i, src+"/vol", o)
		must(t, err)
		if got := read(t, s.onHost(t, guest)+"/sub/there"); got != "host" {
			t.Errorf("%+v: %q", o, got)
		}
	}
	guest, err := s.Rootfs("c1", []Mount{{Type: "bind", Source: src + "/root", Options: []string{"rbind", "rw"}}}, "")
	must(t, err)
	if got := read(t, s.onHost(t, guest)+"/etc"); got != "host" {
		t.Errorf("rootfs: %q", got)
	}
	must(t, s.Remove("c1"))
	h.do(func() error { _, err := os.Stat(src + "/vol/sub/there"); return err }) // its own is still there
}

// A root filesystem over layers that containerd has mounted after the pod's start,
// with as many of them as make the options longer than a page, on a host whose
// mounts do not propagate.
func TestLayersAreTheHostsOfNow(t *testing.T) {
	h := newHost(t)
	s := h.share()
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 10))
	must(t, os.Mkdir(dir, 0o755))
	upper := []string{"upperdir=" + dir + "/upper", "workdir=" + dir + "/work"}
	must(t, errors.Join(os.Mkdir(dir+"/upper", 0o755), os.Mkdir(dir+"/work", 0o755)))
	var layers []string
	for i := range 100 {
		layer := filepath.Join(dir, strconv.Itoa(i))
		must(t, os.Mkdir(layer, 0o755))
		layers = append(layers, layer)
	}
	h.tmpfs(layers[0], "first")
	h.tmpfs(layers[99], "last")
	for i, n := range []int{1, 100} {
		lower := "lowerdir=" + strings.Join(append(slices.Clone(layers[:n-1]), layers[99]), ":")
		guest, err := s.Rootfs(fmt.Sprintf("c%d", i), []Mount{{Type: "overlay", Source: "overlay", Options: append([]string{lower}, upper...)}}, "")
		must(t, err)
		root := s.onHost(t, guest)
		if got := read(t, root+"/last"); got != "host" {
			t.Errorf("%d layers: %q", n, got)
		}
		write(t, root+"/new", "x")
		var st unix.Statfs_t
		must(t, unix.Statfs(root, &st))
		if st.Flags&unix.ST_NODEV == 0 {
			t.Error("the daemon may open devices in a root filesystem")
		}
		must(t, s.Remove(fmt.Sprintf("c%d", i)))
	}
	if got := read(t, dir+"/upper/new"); got != "x" {
		t.Errorf("the upper directory has %q", got)
	}
	h.do(func() error { _, err := os.ReadFile("/proc/self/status"); return err }) // nothing covers it
}

// HostToContainer: what the host mounts below a shared mount later arrives, and
// goes again; a private one hears of nothing. Removal from the share reaches
// neither the host's mount nor what is below it.
func TestPropagation(t *testing.T) {
	h := newHost(t)
	s := h.share()
	src := t.TempDir()
	h.tmpfs(src, "top")
	h.do(func() error { return unix.Mount("", src, "", unix.MS_SHARED, "") })
	h.tmpfs(src+"/before", "there")

	bind := func(i int, o BindOptions) string {
		t.Helper()
		guest, err := s.Bind("c1", i, src, o)
		must(t, err)
		return s.onHost(t, guest)
	}
	slave, ro := bind(0, BindOptions{Recursive: true}), bind(1, BindOptions{Recursive: true, ReadOnly: true})
	private := bind(2, BindOptions{Recursive: true, Private: true})
	h.tmpfs(src+"/later", "there")
	for _, dir := range []string{slave, ro} {
		if got := read(t, dir+"/later/there"); got != "host" {
			t.Errorf("%s: %q", dir, got)
		}
	}
	if mounts := storagetest.Mounts(t, private); slices.Contains(mounts, private+"/later") || !slices.Contains(mounts, private+"/before") {
		t.Errorf("private: %v", mounts)
	}
	h.do(func() error { return unix.Unmount(src+"/later", 0) })
	if mounts := storagetest.Mounts(t, slave); slices.Contains(mounts, slave+"/later") {
		t.Errorf("after the host's unmount: %v", mounts)
	}
	must(t, unix.Mount("tmpfs", slave+"/later", "tmpfs", 0, ""))
	h.do(func() error {
		if _, err := os.Stat(src + "/later/there"); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("a mount in the share reached the host: %v", err)
		}
		return nil
	})
	must(t, s.Remove("c1"))
	for _, file := range []string{"/top", "/before/there"} {
		h.do(func() error { _, err := os.Stat(src + file); return err })
	}
}
