// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/protocols"
)

// What a container uses of the share is left with its last user; what is not of the
// share stays.
func TestLeaveShare(t *testing.T) {
	share, elsewhere := t.TempDir(), t.TempDir()
	root, pods := filepath.Join(share, "c1", "rootfs"), filepath.Join(share, protocols.PodSharePrefix+"1")
	plain, file := filepath.Join(share, "c1", "plain"), filepath.Join(share, "c1", "file")
	for _, dir := range []string{root, pods, plain} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	mounted := []string{root, pods, elsewhere}
	for _, dir := range mounted {
		if err := unix.Mount("share-test", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }) // one of them is gone
	}
	inside := func(dir string) string { return filepath.Join(dir, "inside") }
	for _, dir := range mounted {
		if err := os.WriteFile(inside(dir), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}

	c := &Container{pod: &Pod{}}
	spec := &specs.Spec{Root: &specs.Root{Path: root}}
	for _, source := range []string{pods, plain, file, elsewhere, "tmpfs"} {
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/d", Source: source})
	}
	if err := c.enterShare(share, spec); err != nil {
		t.Fatal(err)
	}
	other := &Container{pod: c.pod}
	if err := other.enterShare(share, &specs.Spec{Mounts: spec.Mounts[:1]}); err != nil {
		t.Fatal(err)
	}
	if want := []string{root, pods, plain, file}; !slices.Equal(c.share.entered, want) {
		t.Errorf("entered %q, want %q", c.share.entered, want)
	}
	if err := c.holdMounts(os.Getpid()); err != nil || c.share.mounts == nil {
		t.Errorf("the mount namespace is held by %v, %v", c.share.mounts, err)
	}
	for range 2 { // RemoveContainer may be called again
		if err := c.leaveShare(); err != nil {
			t.Fatal(err)
		}
	}
	for dir, want := range map[string]bool{root: false, pods: true, elsewhere: true} {
		if _, err := os.Stat(inside(dir)); (err == nil) != want {
			t.Errorf("%s: mounted %v, want %v", dir, err == nil, want)
		}
	}

	if err := other.leaveShare(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(inside(pods)); err == nil || len(c.pod.shared) > 0 {
		t.Errorf("after its last user %s is mounted: %v; in use are %v", pods, err, c.pod.shared)
	}
	if _, left := c.pod.stale[root]; !left || c.share.mounts != nil {
		t.Errorf("left are %q, the mount namespace is held by %v", c.pod.stale, c.share.mounts)
	}

	spec.Mounts = []specs.Mount{{Destination: "/gone", Source: filepath.Join(share, "gone")}}
	if err := c.enterShare(share, spec); err == nil {
		t.Error("a directory that is not there is entered")
	}
}

// What the host has taken out of the share is forgotten, what is there stays, and
// nothing is made by asking.
func TestForget(t *testing.T) {
	share := t.TempDir()
	there, gone := filepath.Join(share, "c1", "rootfs"), filepath.Join(share, "c2", "rootfs")
	if err := os.MkdirAll(there, 0o755); err != nil {
		t.Fatal(err)
	}
	p := &Pod{}
	p.left(share, []string{there, gone, filepath.Join(share, "c3-0-file")})
	if err := p.LeaveShare(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, left := p.stale[there]; len(p.stale) != 1 || !left {
		t.Errorf("not forgotten are %q, want %s alone", p.stale, there)
	}
	if names, err := os.ReadDir(share); err != nil || len(names) != 1 {
		t.Errorf("the share has %v, %v", names, err)
	}
}
