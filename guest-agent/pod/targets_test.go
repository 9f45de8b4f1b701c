// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// targetRoot is a root filesystem with links that lead to nothing, out of it and in circles.
func targetRoot(t *testing.T) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "root")
	for _, dir := range []string{"etc", "run", "real", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	for name, to := range map[string]string{
		"etc/resolv.conf": "../run/systemd/resolve/stub.conf", "dangling": "/nowhere/at/all", "out": "../../../outside",
		"loop": "loop", "var": "real", "up": "real/../../up2", "there": "/etc",
	} {
		if err := os.Symlink(to, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return root
}

// TestTargets: where a mount is to go exists, whatever leads there, and nothing
// outside of the root filesystem is made.
func TestTargets(t *testing.T) {
	file := filepath.Join(t.TempDir(), "source")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		destination string
		file        bool
		want        string // the engine's destination
		made        string // what is there afterwards, "" when nothing is made
	}{
		{"/etc/resolv.conf", true, "/run/systemd/resolve/stub.conf", "run/systemd/resolve/stub.conf"},
		{"/dangling", false, "/nowhere/at/all", "nowhere/at/all"},
		{"/out", false, "/outside", "outside"},
		{"/out/below/it", true, "/outside/below/it", "outside/below/it"},
		{"/var/lib/a", false, "/real/lib/a", "real/lib/a"},
		{"/up/x", false, "/up2/x", "up2/x"},
		{"/there/new", true, "/etc/new", "etc/new"},
		{"relative/../plain", false, "/plain", "plain"},
		{"/there", false, "/there", ""},
		{"/loop/x", false, "/loop/x", ""},
		{"/file/x", false, "/file/x", ""},
		{"/mounted/below", false, "/mounted/below", ""},
	} {
		root := targetRoot(t)
		m := specs.Mount{Type: "bind", Source: root, Destination: c.destination}
		if c.file {
			m.Source = file
		}
		spec := &specs.Spec{Root: &specs.Root{Path: root}, Mounts: []specs.Mount{{Type: "tmpfs", Destination: "/mounted"}, m}}
		if err := prepareTargets(spec); err != nil {
			t.Errorf("%s: %v", c.destination, err)
			continue
		}
		if got := spec.Mounts[1].Destination; got != c.want {
			t.Errorf("%s is mounted at %s, want %s", c.destination, got, c.want)
		}
		if c.made != "" {
			if st, err := os.Lstat(filepath.Join(root, c.made)); err != nil || st.IsDir() == c.file || st.Mode()&os.ModeSticky != 0 {
				t.Errorf("%s: %s: %v, %v", c.destination, c.made, st, err)
			}
		} else if _, err := os.Lstat(filepath.Join(root, "mounted", "below")); err == nil {
			t.Errorf("%s was made below another mount", c.destination)
		}
		if names, err := os.ReadDir(filepath.Dir(root)); err != nil || len(names) != 1 {
			t.Errorf("%s: beside the root there is %v, %v", c.destination, names, err)
		}
	}
}

// TestTargetBelowTmpfs: a link into a tmpfs that is mounted first is followed, and
// what it covers is left alone.
func TestTargetBelowTmpfs(t *testing.T) {
	root := targetRoot(t)
	spec := &specs.Spec{Root: &specs.Root{Path: root}, Mounts: []specs.Mount{
		{Type: "tmpfs", Destination: "/run"}, {Type: "bind", Source: "/dev/null", Destination: "/etc/resolv.conf"},
	}}
	if err := prepareTargets(spec); err != nil {
		t.Fatal(err)
	}
	if got := spec.Mounts[1].Destination; got != "/run/systemd/resolve/stub.conf" {
		t.Errorf("the file is mounted at %s", got)
	}
	if names, err := os.ReadDir(filepath.Join(root, "run")); err != nil || len(names) != 0 {
		t.Errorf("below the tmpfs there is %v, %v", names, err)
	}
}

// TestTmpfsMode: without a word about it a tmpfs has the mode of what it covers.
func TestTmpfsMode(t *testing.T) {
	root := targetRoot(t)
	if err := unix.Chmod(filepath.Join(root, "tmp"), 0o1730); err != nil {
		t.Fatal(err)
	}
	spec := &specs.Spec{Root: &specs.Root{Path: root}, Mounts: []specs.Mount{
		{Type: "tmpfs", Destination: "/tmp", Options: []string{"nosuid"}}, {Type: "tmpfs", Destination: "/etc", Options: []string{"mode=711"}},
		{Type: "tmpfs", Destination: "/new"}, {Type: "tmpfs", Destination: "/tmp/below"},
	}}
	if err := prepareTargets(spec); err != nil {
		t.Fatal(err)
	}
	for i, want := range [][]string{{"nosuid", "mode=1730"}, {"mode=711"}, nil, nil} {
		if got := spec.Mounts[i].Options; !slices.Equal(got, want) {
			t.Errorf("%s has the options %q, want %q", spec.Mounts[i].Destination, got, want)
		}
	}
}
