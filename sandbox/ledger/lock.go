// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// The bytes of the lock file.
const (
	aliveByte = 0
	reapByte  = 1
)

var errLocked = errors.New("locked by another process")

func openLock(dir string) (*os.File, error) {
	return os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
}

// lockByte takes one byte of the lock for the open file description, or fails
// at once with errLocked.
func lockByte(f *os.File, b int64) error {
	err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: b, Len: 1})
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return errLocked
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return nil
}

// byteLocked asks without taking the lock, so that asking disturbs nobody.
func byteLocked(f *os.File, b int64) (bool, error) {
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: b, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l); err != nil {
		return false, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return l.Type != unix.F_UNLCK, nil
}

// sameFile says whether path still names the open file.
func sameFile(f *os.File, path string) error {
	a, err := f.Stat()
	if err != nil {
		return err
	}
	b, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !os.SameFile(a, b) {
		return fmt.Errorf("%s is another file", path)
	}
	return nil
}

// lockDead locks a dead sandbox for reaping. It returns nil without an error when
// the directory went away meanwhile, ErrAlive or ErrBusy when it must not be touched.
func lockDead(dir string) (*os.File, error) {
	f, err := openLock(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("ledger: %w", err)
	}
	if err = claim(f); err != nil {
		f.Close()
		return nil, err
	}
	// Another reaper may have finished, and a new sandbox begun, between open and lock.
	if sameFile(f, filepath.Join(dir, lockFile)) != nil {
		f.Close()
		return nil, nil
	}
	return f, nil
}

// claim takes the reaper's byte. The alive byte is only asked about: once free,
// nobody can take it again, since Create does so before the directory has its name.
func claim(f *os.File) error {
	alive, err := byteLocked(f, aliveByte)
	if err != nil {
		return fmt.Errorf("ledger: %w", err)
	}
	if alive {
		return ErrAlive
	}
	err = lockByte(f, reapByte)
	if errors.Is(err, errLocked) {
		return ErrBusy
	}
	return err
}
