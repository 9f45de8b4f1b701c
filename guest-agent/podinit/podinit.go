// SPDX-License-Identifier: Apache-2.0

// Package podinit is the first process of a PID namespace that the containers of
// a pod share, where no pause container is that: the agent's own program once
// more, with another name. It outlives every container, since a PID namespace
// ends with its first process, and reaps what their processes leave behind.
//
// The containers see it as process 1. It holds nothing of the guest: no
// capabilities, no open files, an empty read-only root.
package podinit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/reaper"
)

// Name is the program's name (argv[0]) when it is to be the first process of a
// shared PID namespace.
const Name = "pod-init"

// readyFD is the pipe by which it tells that it has set itself up, with the word
// isReady, or why it could not.
const (
	readyFD = 3
	isReady = "ready"
)

// Start starts it in a new PID namespace and returns its pid, and the channel
// that tells its end, when it is ready.
func Start(ctx context.Context, r *reaper.Reaper) (int, <-chan reaper.Status, error) {
	ready, w, err := os.Pipe()
	if err != nil {
		return 0, nil, fmt.Errorf("%s: %w", Name, err)
	}
	defer ready.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		w.Close()
		return 0, nil, fmt.Errorf("%s: %w", Name, err)
	}
	defer null.Close()
	pid, gone, err := r.Start("/proc/self/exe", []string{Name}, &syscall.ProcAttr{
		Env: []string{"GOMAXPROCS=1"}, Files: []uintptr{null.Fd(), null.Fd(), null.Fd(), w.Fd()},
		Sys: &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS},
	})
	w.Close()
	if err != nil {
		return 0, nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = unix.Kill(pid, unix.SIGKILL) })
	defer stop()
	said, err := io.ReadAll(io.LimitReader(ready, 512)) // to the end: it closes the pipe
	if string(said) == isReady {
		return pid, gone, nil
	}
	_ = unix.Kill(pid, unix.SIGKILL)
	<-gone
	return 0, nil, errors.Join(fmt.Errorf("%s did not become ready: %q", Name, said), err, context.Cause(ctx))
}

// Main is the process. It returns only on an error.
func Main() error {
	runtime.LockOSThread() // the first thread, whose capabilities /proc shows
	signal.Ignore()        // nobody in the pod ends it for the others by a plain signal
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	ready := os.NewFile(readyFD, "ready")
	if err := confine(); err != nil {
		return errors.Join(err, tell(ready, err.Error()))
	}
	if err := tell(ready, isReady); err != nil {
		return err
	}
	for {
		for {
			if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err != unix.EINTR && (err != nil || pid <= 0) {
				break
			}
		}
		<-children
	}
}

func tell(ready *os.File, text string) error {
	_, err := ready.WriteString(text)
	if err = errors.Join(err, ready.Close()); err != nil {
		return fmt.Errorf("%s: ready: %w", Name, err)
	}
	return nil
}

// confine leaves the guest's files and gives up every privilege.
func confine() error {
	// With it every container would end. Where it may not be lowered (no
	// CAP_SYS_RESOURCE, so not in a guest) it stays as it is.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	const root = "/run" // any directory: it is covered in this mount namespace only
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"private mounts", func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") }},
		{"empty root", func() error { return unix.Mount("none", root, "tmpfs", unix.MS_RDONLY, "size=4k") }},
		{"enter it", func() error { return unix.Chdir(root) }},
		// The new root on top of the old one, which is then taken away from
		// below it (pivot_root(2), "pivot_root(".", ".")").
		{"pivot_root", func() error { return unix.PivotRoot(".", ".") }},
		{"leave the old root", func() error { return unix.Unmount(".", unix.MNT_DETACH) }},
		{"root directory", func() error { return unix.Chdir("/") }},
		{"capabilities", dropCapabilities},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %s: %w", Name, step.what, err)
		}
	}
	return nil
}

// dropCapabilities empties the sets of every thread (capset(2)).
func dropCapabilities() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&none[0])), 0)
	if errno == unix.ENOTSUP {
		// Only in a program with cgo, which a test with the race detector is: there
		// the thread that everybody sees has to do.
		return unix.Capset(&header, &none[0])
	}
	if errno != 0 {
		return errno
	}
	return nil
}
