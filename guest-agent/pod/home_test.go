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

// TestHome: HOME is what the container's own file says, "/" for an unknown user,
// and what the specification says comes first.
func TestHome(t *testing.T) {
	root, other := t.TempDir(), t.TempDir()
	write := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(root+"/etc/passwd", "root:x:0:0:root:/root:/bin/sh\nbroken\nuser:x:1000:1000::/home/user:\nnone:x:7:7:::\n")
	write(other+"/passwd", "root:x:0:0:root:/elsewhere:/bin/sh\n")
	for _, c := range []struct {
		name   string
		env    []string
		uid    uint32
		mounts []specs.Mount
		want   []string
	}{
		{"root", []string{"A=1"}, 0, nil, []string{"A=1", "HOME=/root"}},
		{"user", nil, 1000, nil, []string{"HOME=/home/user"}},
		{"unknown", nil, 4242, nil, []string{"HOME=/"}},
		{"without a home", nil, 7, nil, []string{"HOME=/"}},
		{"given", []string{"HOME=/x"}, 0, nil, []string{"HOME=/x"}},
		{"empty", []string{"HOME=", "A=1"}, 0, nil, []string{"A=1", "HOME=/root"}},
		{"mounted file", nil, 0, []specs.Mount{{Destination: "/etc/passwd", Source: other + "/passwd"}}, []string{"HOME=/elsewhere"}},
		{"mounted directory", nil, 0, []specs.Mount{{Destination: "/etc/", Source: other}, {Destination: "/etcetera", Source: root}}, []string{"HOME=/elsewhere"}},
		{"nothing there", nil, 0, []specs.Mount{{Destination: "/etc", Type: "tmpfs", Source: "tmpfs"}}, []string{"HOME=/"}},
	} {
		spec := &specs.Spec{Root: &specs.Root{Path: root}, Mounts: c.mounts, Process: &specs.Process{Env: c.env, User: specs.User{UID: c.uid}}}
		dir, passwd := passwdOf(spec)
		addHome(spec.Process, dir, passwd)
		if !slices.Equal(spec.Process.Env, c.want) {
			t.Errorf("%s: %q; want %q", c.name, spec.Process.Env, c.want)
		}
	}
	// What an image may have in its place: a link out of it, or a pipe that nobody writes to.
	for name, make := range map[string]func(path string) error{
		"link": func(p string) error { return os.Symlink(other+"/passwd", p) },
		"pipe": func(p string) error { return unix.Mkfifo(p, 0o644) },
	} {
		dir := t.TempDir()
		if err := make(dir + "/passwd"); err != nil {
			t.Fatal(err)
		}
		if home, err := homeIn(dir, "/passwd", 0); home != noHome || err != nil {
			t.Errorf("%s: %q, %v", name, home, err)
		}
	}
}
