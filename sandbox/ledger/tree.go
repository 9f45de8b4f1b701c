// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// removeTree removes a directory with its content. Unlike os.RemoveAll it never
// crosses a mount, bind mounts of the same file system included: what is mounted
// there is not the sandbox's.
func removeTree(path string) error {
	parent, err := os.Open(filepath.Dir(path))
	if err != nil {
		return ignoreMissing(err)
	}
	defer parent.Close()
	return removeAt(parent, filepath.Base(path), path, nil)
}

// removeAt removes name below parent; path is for errors. Names in keep stay, and
// so does then the directory itself.
func removeAt(parent *os.File, name, path string, keep map[string]bool) error {
	err := unix.Unlinkat(int(parent.Fd()), name, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return &os.PathError{Op: "unlink", Path: path, Err: err}
	}
	fd, err := unix.Openat2(int(parent.Fd()), name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_BENEATH,
	})
	if errors.Is(err, unix.EXDEV) {
		return fmt.Errorf("%s is a mount point; unmount it first", path)
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	dir := os.NewFile(uintptr(fd), path)
	err = emptyDir(dir, path, keep)
	dir.Close()
	if err != nil || keep != nil {
		return err
	}
	if err := unix.Unlinkat(int(parent.Fd()), name, unix.AT_REMOVEDIR); err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "rmdir", Path: path, Err: err}
	}
	return nil
}

func emptyDir(dir *os.File, path string, keep map[string]bool) error {
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range names {
		if !keep[n] {
			errs = append(errs, removeAt(dir, n, filepath.Join(path, n), nil))
		}
	}
	return errors.Join(errs...)
}

// removeSandboxDir removes a ledger's directory. The lock goes last: as long as
// the directory has content, Create does not take its place. A new sandbox may do
// so between the last two steps, which ENOTEMPTY tells.
func removeSandboxDir(dir string) error {
	parent, err := os.Open(filepath.Dir(dir))
	if err != nil {
		return ignoreMissing(err)
	}
	defer parent.Close()
	name := filepath.Base(dir)
	if err := removeAt(parent, name, dir, map[string]bool{lockFile: true}); err != nil {
		return fmt.Errorf("ledger: %w", err)
	}
	if err := removeFile(filepath.Join(dir, lockFile)); err != nil {
		return fmt.Errorf("ledger: %w", err)
	}
	err = unix.Unlinkat(int(parent.Fd()), name, unix.AT_REMOVEDIR)
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTEMPTY) {
		return fmt.Errorf("ledger: %w", &os.PathError{Op: "rmdir", Path: dir, Err: err})
	}
	return nil
}
