// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// maxLinks is how many symbolic links a path may lead through (path_resolution(7)).
const maxLinks = 40

// prepareTargets makes the places in the root filesystem at which the engine is to
// mount something, as every other runtime would, and says where they are: the engine
// refuses a symbolic link that leads to nothing, such as the /etc/resolv.conf of many
// an image, and gives the directories that it makes the sticky bit. A tmpfs about whose
// mode nothing is said gets that of the directory that it covers. What cannot be made
// here is left to the engine, whose error names the mount.
func prepareTargets(spec *specs.Spec) error {
	if spec.Root == nil {
		return nil
	}
	root, err := unix.Open(spec.Root.Path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("root.path: %w", &os.PathError{Op: "open", Path: spec.Root.Path, Err: err})
	}
	defer unix.Close(root)
	t := targets{root: root}
	for i := range spec.Mounts {
		m := &spec.Mounts[i]
		name := path.Clean("/" + m.Destination)
		switch {
		case t.isCovered(name):
		case !t.exists(name):
			if at, ok := t.make(name, isFile(m)); ok {
				m.Destination = at
			}
		case m.Type == "tmpfs" && !slices.ContainsFunc(m.Options, func(o string) bool { return strings.HasPrefix(o, "mode=") }):
			t.keepMode(m)
		}
		t.covered = append(t.covered, name, m.Destination)
	}
	return nil
}

// targets are the places in a root filesystem where something is mounted.
type targets struct {
	root    int      // descriptor
	covered []string // destinations of the mounts so far: what is below them is not the root's
}

func (t *targets) isCovered(name string) bool {
	return slices.ContainsFunc(t.covered, func(c string) bool { return name == c || strings.HasPrefix(name, c+"/") })
}

// open opens a path in the root, which no symbolic link leaves.
func (t *targets) open(name string) (int, error) {
	return unix.Openat2(t.root, "."+name, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
}

func (t *targets) exists(name string) bool {
	fd, err := t.open(name)
	if err == nil {
		unix.Close(fd)
	}
	return !errors.Is(err, unix.ENOENT)
}

// isFile tells whether a mount shows a file instead of a directory.
func isFile(m *specs.Mount) bool {
	if m.Type != "bind" && !slices.Contains(m.Options, "bind") && !slices.Contains(m.Options, "rbind") {
		return false
	}
	st, err := os.Stat(m.Source)
	return err == nil && !st.IsDir()
}

// make makes what is missing of a path and returns it without symbolic links. What is
// below another mount the engine makes when that is there.
func (t *targets) make(name string, file bool) (at string, ok bool) {
	rest := strings.Split(name, "/")
	for links := 0; len(rest) > 0; {
		part := rest[0]
		rest = rest[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			at = at[:max(0, strings.LastIndexByte(at, '/'))]
			continue
		}
		next := at + "/" + part
		if t.isCovered(next) {
			at = next
			continue
		}
		if to, ok := t.link(next); ok {
			if links++; links > maxLinks {
				return "", false
			}
			if strings.HasPrefix(to, "/") {
				at = ""
			}
			rest = append(strings.Split(to, "/"), rest...)
			continue
		}
		if err := t.makeOne(at, part, file && len(rest) == 0); err != nil && !errors.Is(err, unix.EEXIST) {
			return "", false
		}
		at = next
	}
	return at, at != ""
}

// link reads a symbolic link of which no parent is one.
func (t *targets) link(name string) (string, bool) {
	to := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(t.root, "."+name, to)
	return string(to[:max(n, 0)]), err == nil
}

// makeOne makes an empty file or a directory in dir, which is no symbolic link.
func (t *targets) makeOne(dir, name string, file bool) error {
	parent, err := t.open(dir)
	if err != nil {
		return err
	}
	defer unix.Close(parent)
	if !file {
		return unix.Mkdirat(parent, name, 0o755)
	}
	fd, err := unix.Openat(parent, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o755)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// keepMode gives a tmpfs the mode of the directory that it covers.
func (t *targets) keepMode(m *specs.Mount) {
	fd, err := t.open(path.Clean("/" + m.Destination))
	if err != nil {
		return // the engine's error says why
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		m.Options = append(slices.Clone(m.Options), fmt.Sprintf("mode=%o", st.Mode&0o7777))
	}
}
