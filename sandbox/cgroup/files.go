// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mark is an extended attribute of the directories that pods made above their
// own: whichever of them ends last removes those.
const mark = "trusted.kata.parent"

// vanishing bounds how often a parent may be removed, by a pod that ends, between
// its making and the next step.
const vanishing = 100

// makeDir makes the directory of one hierarchy and what is missing above it.
// Everything is recorded first.
func (g *Group) makeDir(d Dir) error {
	var err error
	for range vanishing {
		if err = g.makeParents(d); err == nil {
			err = g.makeLeaf(d)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return err
}

// parents lists the directories between the mount and d, from the top.
func (d Dir) parents() (out []string) {
	rel, err := filepath.Rel(d.Mount, filepath.Dir(d.Path))
	if err != nil || rel == "." {
		return nil
	}
	at := d.Mount
	for name := range strings.SplitSeq(rel, "/") {
		at = filepath.Join(at, name)
		out = append(out, at)
	}
	return out
}

func (g *Group) makeParents(d Dir) error {
	for _, p := range d.parents() {
		_, err := os.Stat(p)
		switch {
		case err == nil && !marked(p):
			continue // somebody else's
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return err
		}
		missing := err != nil
		if err := g.record(p, true); err != nil {
			return err
		}
		if !missing {
			continue
		}
		if err := os.Mkdir(p, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		// Without the mark only its maker removes it, which may be too early.
		if err := unix.Setxattr(p, mark, []byte("1"), 0); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return &os.PathError{Op: "setxattr", Path: p, Err: err}
		}
	}
	return nil
}

func marked(p string) bool {
	_, err := unix.Getxattr(p, mark, nil)
	return err == nil
}

// makeLeaf makes the pod's own directory. An empty one that is there already is
// taken over; one with somebody in it is another pod's.
func (g *Group) makeLeaf(d Dir) error {
	if err := unused(d.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := g.record(d.Path, false); err != nil {
		return err
	}
	err := os.Mkdir(d.Path, 0o755)
	if errors.Is(err, fs.ErrExist) {
		err = unused(d.Path)
	}
	if err != nil {
		return errors.Join(err, g.forget(d.Path))
	}
	return nil
}

// errInUse: two pods have one cgroup, or something runs where a pod ought to.
var errInUse = errors.New("the cgroup is in use")

func unused(dir string) error {
	pids, err := members(dir)
	if err == nil && len(pids) > 0 {
		err = fmt.Errorf("%s: %w by process %d", dir, errInUse, pids[0])
	}
	return err
}

// members lists the processes of one cgroup; a process of another pid namespace shows as 0.
func members(dir string) (pids []int, err error) {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	for f := range strings.FieldsSeq(string(data)) {
		pid, err := strconv.Atoi(f)
		if err != nil {
			return nil, fmt.Errorf("%s/cgroup.procs: %w", dir, err)
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// writeFile writes to a file of a cgroup, which exists or is not to be made.
func writeFile(value string, path ...string) error {
	f, err := os.OpenFile(filepath.Join(path...), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

func readFile(path ...string) (string, error) {
	data, err := os.ReadFile(filepath.Join(path...))
	return strings.TrimSpace(string(data)), err
}

// enable hands the controllers of version 2 down to d. It returns those that d
// does not get, of the ones that a pod wants.
func (d Dir) enable() (missing []string) {
	// The writes may fail: what counts is what the directory has in the end.
	for _, p := range append([]string{d.Mount}, d.parents()...) {
		for _, c := range wanted {
			writeFile("+"+c, p, "cgroup.subtree_control") //nolint:errcheck // see above
		}
	}
	have, _ := readFile(d.Path, "cgroup.controllers")
	for _, c := range wanted {
		if !strings.Contains(" "+have+" ", " "+c+" ") {
			missing = append(missing, c)
		}
	}
	return missing
}

// wanted are the controllers by which pods are limited and counted.
var wanted = []string{"cpu", "cpuset", "io", "memory", "pids"}

// inheritCPUs gives a directory of version 1, and empty ones above it, the CPUs
// and memory nodes of their parents: a new one has none, and takes no process (kernel
// Documentation/admin-guide/cgroup-v1/cpusets.rst).
func (d Dir) inheritCPUs() error {
	for _, p := range append(d.parents(), d.Path) {
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			own, err := readFile(p, f)
			if err != nil {
				return err
			}
			if own != "" {
				continue
			}
			above, err := readFile(filepath.Dir(p), f)
			if err == nil {
				err = writeFile(above, p, f)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}
