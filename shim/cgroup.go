// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// joinCgroup puts a process into the cgroup at path, in every hierarchy of this
// host that has it. The cgroup is the operator's: it is neither made nor removed.
func joinCgroup(path string, pid int) error {
	roots, err := cgroupRoots()
	if err != nil {
		return err
	}
	return join(roots, path, pid)
}

func join(roots []string, path string, pid int) error {
	var joined bool
	for _, root := range roots {
		// Cleaned as an absolute path first, it cannot lead out of the root.
		procs := filepath.Join(root, filepath.Join("/", path), "cgroup.procs")
		err := os.WriteFile(procs, []byte(strconv.Itoa(pid)), 0)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		joined = true
	}
	if !joined {
		return fmt.Errorf("no hierarchy of %s has the cgroup %q, which must exist: %w", strings.Join(roots, ", "), path, errdefs.ErrInvalidArgument)
	}
	return nil
}

// cgroupRoots are the mount points of all cgroup hierarchies, of either version
// (proc_pid_mounts(5): the second field, the third is the type).
func cgroupRoots() ([]string, error) {
	data, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, fmt.Errorf("cgroup hierarchies: %w", err)
	}
	var roots []string
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 2 && (f[2] == "cgroup" || f[2] == "cgroup2") {
			roots = append(roots, f[1])
		}
	}
	return roots, nil
}
