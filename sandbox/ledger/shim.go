// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// WaitDead returns when the sandbox's shim is gone, at once if it is already or
// if there is no such sandbox. It is for whoever has seen the shim's socket close:
// a dying process closes its files one after another, the lock perhaps last. When
// ctx is done first, the error is ErrAlive.
func WaitDead(ctx context.Context, root, key string) error {
	return withShim(root, key, func(fd int) error { return pollFd(ctx, fd, unix.POLLIN) })
}

// KillShim ends a live shim with SIGKILL and returns when it is gone, so that Reap
// can follow. It is for a shim that no longer answers.
func KillShim(ctx context.Context, root, key string) error {
	return withShim(root, key, func(fd int) error { return killPidfd(ctx, fd) })
}

// withShim runs f with a pidfd of the live shim, and then makes sure that the
// lock is free.
func withShim(root, key string, f func(pidfd int) error) error {
	if err := checkKey(key); err != nil {
		return err
	}
	i, err := inspect(root, key)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil || !i.Alive {
		return err
	}
	fail := func(err error) error {
		return fmt.Errorf("ledger: %s: %w (shim pid %d): %w", filepath.Join(root, key), ErrAlive, i.Meta.Shim.PID, err)
	}
	if i.Meta.Shim.PID == os.Getpid() {
		return fail(errors.New("it is this process"))
	}
	if fd, err := unix.PidfdOpen(i.Meta.Shim.PID, 0); err == nil {
		defer unix.Close(fd)
		// Not another process that got the pid meanwhile.
		if start, err := StartTime(i.Meta.Shim.PID); err == nil && start == i.Meta.Shim.Start {
			if err := f(fd); err != nil {
				return fail(err)
			}
		}
	} else if !errors.Is(err, unix.ESRCH) {
		return fail(err)
	}
	if i, err = inspect(root, key); err == nil && i.Alive {
		return fail(errors.New("another process holds the lock"))
	}
	return ignoreMissing(err)
}
