// SPDX-License-Identifier: Apache-2.0

// Package guestsched sets the one knob of a guest kernel's scheduler that
// decides how fast bulk data crosses vsock; docs/decisions.md has the figures.
package guestsched

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// WakeupGranularity is by how much, in nanoseconds, a task that wakes up must be
// behind the running one to take the CPU from it at once instead of at the end
// of its slice. The kernel's own 1 ms lets the reader of a socket interrupt the
// worker that fills it at every packet, and that worker the writer of one. 15 ms
// is what tuned's profiles for virtual guests have chosen for long.
const WakeupGranularity = 15_000_000

// Tune sets WakeupGranularity where the kernel has it: CFS with its debug files,
// until Linux 6.5. Elsewhere – the scheduler since 6.6 does not preempt that
// eagerly – it does nothing. Nothing stays mounted. It needs root.
func Tune() error {
	dir, err := openDebugFS()
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EPERM) && os.Geteuid() == 0 {
		return nil // a kernel without debugfs, or one that keeps it closed
	}
	if err != nil {
		return fmt.Errorf("tune the guest's scheduler: debugfs: %w", err)
	}
	defer unix.Close(dir)
	return tune(dir)
}

// tune works on the root of a debugfs.
func tune(dir int) error {
	err := write(dir, "sched/wakeup_granularity_ns", fmt.Sprint(WakeupGranularity))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		// The kernel computes the value anew when a CPU comes, from a base that it
		// takes from the present values when the way of scaling is set: to what it
		// is by default, logarithmic in the number of CPUs.
		err = write(dir, "sched/tunable_scaling", "1")
	}
	if err != nil {
		return fmt.Errorf("tune the guest's scheduler: %w", err)
	}
	return nil
}

// openDebugFS returns the root of the kernel's debugfs, which is in no directory.
func openDebugFS() (int, error) {
	ctx, err := unix.Fsopen("debugfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer unix.Close(ctx)
	if err := unix.FsconfigCreate(ctx); err != nil {
		return -1, err
	}
	return unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, 0)
}

func write(dir int, name, value string) error {
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	_, err = f.WriteString(value)
	return err
}
