// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// RemoveCgroup kills everything in a cgroup and below it, then removes both. It
// works on either version. One that is gone is no error.
func RemoveCgroup(ctx context.Context, path string) error {
	if err := onFilesystem(path, unix.CGROUP2_SUPER_MAGIC, unix.CGROUP_SUPER_MAGIC); err != nil {
		return ignoreMissing(err)
	}
	if err := killCgroup(ctx, path); err != nil {
		return err
	}
	dirs, err := subdirs(path)
	if err != nil {
		return err
	}
	for _, d := range slices.Backward(dirs) { // the deepest first
		if err := rmCgroup(ctx, d); err != nil {
			return err
		}
	}
	return nil
}

// RemoveCgroupParent removes a cgroup in which there is neither a process nor
// another cgroup. One that is in use or gone is no error.
func RemoveCgroupParent(path string) error {
	if err := onFilesystem(path, unix.CGROUP2_SUPER_MAGIC, unix.CGROUP_SUPER_MAGIC); err != nil {
		return ignoreMissing(err)
	}
	err := unix.Rmdir(path)
	if err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENOTEMPTY) {
		return nil
	}
	return &os.PathError{Op: "rmdir", Path: path, Err: err}
}

// onFilesystem refuses a path that is on another kind of file system.
func onFilesystem(path string, magics ...int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	if !slices.Contains(magics, int64(st.Type)) {
		return fmt.Errorf("%s is on another file system (type %#x)", path, st.Type)
	}
	return nil
}

// subdirs lists path and the directories below it, parents first.
func subdirs(path string) ([]string, error) {
	var out []string
	err := filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return ignoreMissing(err)
		}
		if d.IsDir() {
			out = append(out, p)
		}
		return nil
	})
	return out, err
}

func ignoreMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil // ENODEV: a cgroup file read while its directory goes away
	}
	return err
}

// killCgroup leaves no process below path. With cgroup.kill (v2, Linux 5.14) the
// kernel does it at once; else members are killed until none is left, which a
// forking member can delay but, killed faster than it forks, not prevent.
func killCgroup(ctx context.Context, path string) error {
	if err := refuseOwnCgroup(path); err != nil {
		return err
	}
	err := os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0)
	if ignoreMissing(err) != nil && !errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("cgroup.kill: %w", err)
	}
	for {
		pids, err := members(path)
		if err != nil {
			return err
		}
		if len(pids) == 0 {
			return nil
		}
		for _, pid := range pids {
			if err := killMember(ctx, pid); err != nil {
				return err
			}
		}
	}
}

// refuseOwnCgroup keeps the reaper from killing itself.
func refuseOwnCgroup(path string) error {
	pids, err := members(path)
	if err == nil && slices.Contains(pids, os.Getpid()) {
		err = errors.New("the reaping process is itself in this cgroup; move it out first")
	}
	return err
}

// members lists the processes of a cgroup and of those below it.
func members(path string) ([]int, error) {
	dirs, err := subdirs(path)
	if err != nil {
		return nil, err
	}
	var out []int
	for _, d := range dirs {
		b, err := os.ReadFile(filepath.Join(d, "cgroup.procs"))
		if ignoreMissing(err) != nil {
			return nil, err
		}
		for s := range strings.FieldsSeq(string(b)) {
			if pid, err := strconv.Atoi(s); err == nil && pid > 0 {
				out = append(out, pid)
			}
		}
	}
	return out, nil
}

// killMember kills a process that cgroup.procs named a moment ago. Its pid cannot
// belong to another by now in practice: pids are given out in turn.
func killMember(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pidfd_open: %w", err)
	}
	defer unix.Close(fd)
	if err := killPidfd(ctx, fd); err != nil {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	return nil
}

// rmCgroup removes one cgroup without members. The kernel reports a process's end
// a moment before it leaves its cgroup, with nothing to wait for on v1, so EBUSY
// is tried again for a short while.
func rmCgroup(ctx context.Context, path string) error {
	deadline := time.Now().Add(2 * time.Second)
	for {
		err := unix.Rmdir(path)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return &os.PathError{Op: "rmdir", Path: path, Err: err}
		}
		select {
		case <-ctx.Done():
			return &os.PathError{Op: "rmdir", Path: path, Err: err}
		case <-time.After(time.Millisecond):
		}
	}
}
