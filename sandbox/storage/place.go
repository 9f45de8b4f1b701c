// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Place makes the file that an attached disk with that ID is the one at path, which
// is replaced: who opens it from now on finds what the machine writes. The disk must
// keep its file (Keep), and both be regular files of one file system; a file that has
// had a name cannot have another one. path keeps its owner and mode. On error it is as it was.
func (d *Disks) Place(id, path string) error {
	f, err := d.file(id)
	if err != nil {
		return err
	}
	defer f.Close()
	now, err := f.Stat()
	if err != nil {
		return err
	}
	was, err := os.Lstat(path)
	if err != nil {
		return typed(err)
	}
	if os.SameFile(now, was) {
		return nil
	}
	if !now.Mode().IsRegular() || !was.Mode().IsRegular() {
		return fmt.Errorf("disk %s is a %s, %s a %s: want regular files: %w", id, now.Mode().Type(), path, was.Mode().Type(), errdefs.ErrFailedPrecondition)
	}
	st := was.Sys().(*syscall.Stat_t)
	if err := errors.Join(f.Chown(int(st.Uid), int(st.Gid)), f.Chmod(was.Mode().Perm())); err != nil {
		return err
	}
	return replace(f, path)
}

// file is another descriptor of a disk's file.
func (d *Disks) file(id string) (*os.File, error) {
	all, err := d.Kept()
	if err != nil {
		return nil, err
	}
	for _, k := range all {
		if k.ID == id && len(k.Parts) == 1 {
			fd, err := unix.FcntlInt(k.Parts[0].File.Fd(), unix.F_DUPFD_CLOEXEC, 0)
			return os.NewFile(uintptr(fd), id), err
		}
	}
	return nil, fmt.Errorf("disk %s: no file of it is kept: %w", id, errdefs.ErrNotFound)
}

// replace puts a file without a name in the place of another one, at once.
func replace(f *os.File, path string) error {
	temporary := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"."+strconv.Itoa(os.Getpid()))
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	from := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	if err := unix.Linkat(unix.AT_FDCWD, from, unix.AT_FDCWD, temporary, unix.AT_SYMLINK_FOLLOW); err != nil {
		return &os.LinkError{Op: "link", Old: f.Name(), New: temporary, Err: err}
	}
	if err := os.Rename(temporary, path); err != nil {
		return errors.Join(err, os.Remove(temporary))
	}
	return nil
}
