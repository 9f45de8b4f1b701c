// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// StartTime returns a live process's start time in clock ticks since boot (field
// 22 of /proc/<pid>/stat, proc(5)). The error is os.ErrNotExist for no such process.
func StartTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, unix.ESRCH) {
		err = os.ErrNotExist
	}
	if err != nil {
		return 0, fmt.Errorf("ledger: process %d: %w", pid, err)
	}
	// The command name may hold spaces and brackets; fields count from after the last one.
	s := string(b)
	fields := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("ledger: process %d: short stat line", pid)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// killProcess kills the process that has this pid and start time, and waits until
// it is gone. killed tells whether there was one.
func killProcess(ctx context.Context, p Proc) (killed bool, err error) {
	if p.PID == os.Getpid() {
		return false, errors.New("is this process")
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("pidfd_open: %w", err)
	}
	defer unix.Close(fd)
	// With the pidfd held the pid cannot come to mean another process unnoticed.
	start, err := StartTime(p.PID)
	if errors.Is(err, os.ErrNotExist) || (err == nil && start != p.Start) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, killPidfd(ctx, fd)
}

// killPidfd sends SIGKILL and waits for the end.
func killPidfd(ctx context.Context, fd int) error {
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("pidfd_send_signal: %w", err)
	}
	return pollFd(ctx, fd, unix.POLLIN)
}

// pollFd waits until events are there or ctx is done, which wakes it through an eventfd.
func pollFd(ctx context.Context, fd int, events int16) error {
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	defer unix.Close(wake)
	written := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(written)
		// Cannot fail: the counter is far from full.
		_, _ = unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	defer func() {
		if !stop() {
			<-written // wake must not be closed, and reused, before the write
		}
	}()
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: events}, {Fd: int32(wake), Events: unix.POLLIN}}
		_, err := unix.Poll(fds, -1)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("poll: %w", err)
		case fds[0].Revents != 0:
			return nil
		default:
			return fmt.Errorf("the process is still there: %w", context.Cause(ctx))
		}
	}
}
