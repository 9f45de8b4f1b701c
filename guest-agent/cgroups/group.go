// SPDX-License-Identifier: Apache-2.0

// Package cgroups keeps one cgroup v2 group for each container, below
// <root>/kata. Everything that is only a file there (limits, statistics, freeze,
// kill, the list of processes) is done here in microseconds; the OCI engine never
// touches cgroups. Files and formats are those of the kernel's
// Documentation/admin-guide/cgroup-v2.rst.
package cgroups

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Parent is the group below the root that holds every container's.
const Parent = "kata"

// Manager makes groups.
type Manager struct {
	dir     string
	watch   *Watcher
	devices programs
}

// controllers are those that a container's limits and statistics need; each costs
// time and memory in every group.
var controllers = []string{"cpuset", "cpu", "io", "memory", "hugetlb", "pids"}

// New prepares <root>/kata, with the controllers that the kernel has enabled in it.
// The Watcher w reports changes of event files.
func New(root string, w *Watcher) (*Manager, error) {
	dir := filepath.Join(root, Parent)
	if err := enableControllers(root); err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("cgroup parent: %w", err)
	}
	if err := enableControllers(dir); err != nil {
		return nil, err
	}
	return &Manager{dir: dir, watch: w, devices: programs{load: loadDevices}}, nil
}

// enableControllers turns controllers on for the children of the group at dir.
func enableControllers(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return fmt.Errorf("cgroup v2 controllers: %w", err)
	}
	names := slices.DeleteFunc(strings.Fields(string(b)), func(c string) bool { return !slices.Contains(controllers, c) })
	if len(names) == 0 {
		return nil
	}
	return write(dir, "cgroup.subtree_control", "+"+strings.Join(names, " +"))
}

// Group is the cgroup of one container.
type Group struct {
	dir     string
	watch   *Watcher
	devices *programs
}

// Create makes the group of container id.
func (m *Manager) Create(id string) (*Group, error) {
	dir := filepath.Join(m.dir, id)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("cgroup of %s: %w", id, err)
	}
	return &Group{dir: dir, watch: m.watch, devices: &m.devices}, nil
}

// Dir is the group's directory.
func (g *Group) Dir() string { return g.dir }

// Open opens the directory for clone3's CLONE_INTO_CGROUP.
func (g *Group) Open() (*os.File, error) {
	return os.OpenFile(g.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}

// Procs lists the processes of the group and of groups below it.
func (g *Group) Procs() ([]int, error) {
	var pids []int
	err := filepath.WalkDir(g.dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // the container removed a group of its own meanwhile
		}
		if err != nil || !d.IsDir() {
			return err
		}
		b, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP) {
			return nil // gone, or a threaded group whose processes are listed above
		}
		if err != nil {
			return err
		}
		for _, f := range bytes.Fields(b) {
			// 0 stands for a process of another pid namespace: none here.
			if n, err := strconv.Atoi(string(f)); err == nil && n > 0 {
				pids = append(pids, n)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("processes of %s: %w", g.dir, err)
	}
	return pids, nil
}

// Kill sends SIGKILL to every process of the group, a frozen one included.
func (g *Group) Kill() error { return write(g.dir, "cgroup.kill", "1") }

// Freeze stops (or lets run) every process and returns when the kernel says so.
func (g *Group) Freeze(ctx context.Context, on bool) error {
	val := "0"
	if on {
		val = "1"
	}
	if err := write(g.dir, "cgroup.freeze", val); err != nil {
		return err
	}
	return g.waitEvent(ctx, "frozen", val)
}

// WaitEmpty returns when no process is left in the group or below it.
func (g *Group) WaitEmpty(ctx context.Context) error { return g.waitEvent(ctx, "populated", "0") }

func (g *Group) waitEvent(ctx context.Context, key, want string) error {
	path := filepath.Join(g.dir, "cgroup.events")
	changed, cancel, err := g.watch.Add(path)
	if err != nil {
		return err
	}
	defer cancel()
	for {
		kv, err := readFlat(path)
		if err != nil {
			return err
		}
		if strconv.FormatUint(kv[key], 10) == want {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s %s in %s: %w", key, want, path, context.Cause(ctx))
		}
	}
}

// WatchOOM calls f each time the kernel's OOM killer has taken a process of the
// group, until ctx is done or the group is removed. A guest without the memory
// controller has nothing to watch.
func (g *Group) WatchOOM(ctx context.Context, f func()) error {
	path := filepath.Join(g.dir, "memory.events")
	changed, cancel, err := g.watch.Add(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer cancel()
	var seen uint64
	for {
		kv, err := readFlat(path)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil
		}
		if err != nil {
			return err
		}
		if n := kv["oom_kill"]; n > seen {
			seen = n
			f()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// Remove deletes the group and those that the container made below it. It must be empty.
func (g *Group) Remove() error {
	var dirs []string
	err := filepath.WalkDir(g.dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	for i := len(dirs) - 1; i >= 0; i-- {
		if e := unix.Rmdir(dirs[i]); e != nil && e != unix.ENOENT && err == nil {
			err = e
		}
	}
	if err != nil {
		return fmt.Errorf("remove cgroup %s: %w", g.dir, err)
	}
	return nil
}

// write sets one file of a group, in one write(2) as the kernel wants it.
func write(dir, file, val string) error {
	f, err := os.OpenFile(filepath.Join(dir, file), os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return fmt.Errorf("cgroup: %w", err)
	}
	defer f.Close()
	if _, err := f.WriteString(val); err != nil {
		return fmt.Errorf("cgroup: set %q: %w", val, err)
	}
	return nil
}

// readFlat reads a flat keyed file, "key number" on each line.
func readFlat(path string) (map[string]uint64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	kv := map[string]uint64{}
	for _, line := range strings.Split(string(b), "\n") {
		k, v, _ := strings.Cut(line, " ")
		if n, err := strconv.ParseUint(v, 10, 64); err == nil {
			kv[k] = n
		}
	}
	return kv, nil
}
