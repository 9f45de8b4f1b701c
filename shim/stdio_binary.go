// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/internal/spawn"
	"github.com/kata-v2/kata/internal/tail"
)

const (
	// driverReadyTimeout bounds a log driver's start.
	driverReadyTimeout = 10 * time.Second
	// driverEndTimeout is what a log driver gets after the end of its streams;
	// runc's shim gives it 12 s.
	driverEndTimeout = 10 * time.Second
)

// logDriver is the program of a binary:// address: it reads stdout from
// descriptor 3 and stderr from 4, and closes (or writes to) 5 when it is ready
// (containerd docs/runtime-v2.md, "Logging"; core/runtime/v2/logging). Its
// environment is CONTAINER_ID and CONTAINER_NAMESPACE and nothing else.
type logDriver struct {
	path   string
	pipes  [2]*os.File // our ends of stdout's and stderr's, nil where it carries none
	ready  *os.File    // our end of descriptor 5
	cmd    *exec.Cmd
	stderr *tail.Buffer
	done   chan struct{} // closed when it is gone; err is set before
	err    error
}

// startDriver starts a driver for the streams it carries; the other one is at
// its end from the beginning. It dies with this process and is in the ledger.
func (h *stdioHost) startDriver(id string, t target, carries [2]bool) (_ *logDriver, err error) {
	d := &logDriver{path: t.path, stderr: tail.New(1024), done: make(chan struct{})}
	var theirs []*os.File
	defer func() {
		closeAll(theirs...)
		if err != nil {
			closeAll(d.pipes[0], d.pipes[1], d.ready)
		}
	}()
	for i := range d.pipes {
		r, w, err := plainPipe(false)
		if err != nil {
			return nil, fmt.Errorf("log driver %s: %w", t.path, err)
		}
		theirs = append(theirs, r)
		if carries[i] {
			d.pipes[i] = w
		} else {
			w.Close()
		}
	}
	r, w, err := plainPipe(true)
	if err != nil {
		return nil, fmt.Errorf("log driver %s: %w", t.path, err)
	}
	d.ready, theirs = r, append(theirs, w)
	d.cmd = exec.Command(t.path, t.args...)
	d.cmd.Env = []string{"CONTAINER_ID=" + id, "CONTAINER_NAMESPACE=" + h.namespace}
	d.cmd.ExtraFiles = theirs
	d.cmd.Stderr = d.stderr
	d.cmd.WaitDelay = time.Second // a child of its own may keep its stderr open
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := h.launch(d); err != nil {
		return nil, fmt.Errorf("log driver %s: %w", t.path, err)
	}
	return d, nil
}

// plainPipe is a pipe whose other end – the reader's, or the writer's – is for a
// program that expects reads and writes to block.
func plainPipe(weRead bool) (r, w *os.File, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, err
	}
	ours := p[1]
	if weRead {
		ours = p[0]
	}
	if err := unix.SetNonblock(ours, true); err != nil {
		unix.Close(p[0])
		unix.Close(p[1])
		return nil, nil, err
	}
	r, w = os.NewFile(uintptr(p[0]), "pipe"), os.NewFile(uintptr(p[1]), "pipe")
	if !weRead {
		widen(w)
	}
	return r, w, nil
}

func (h *stdioHost) launch(d *logDriver) error {
	thread := spawn.NewThread()
	if err := thread.Start(d.cmd); err != nil {
		thread.Close()
		return err
	}
	forget := func() {}
	if h.record != nil {
		f, err := h.record("log driver "+filepath.Base(d.path), d.cmd.Process.Pid)
		if err != nil {
			d.kill()
			_ = d.cmd.Wait() // it was killed
			thread.Close()
			return err
		}
		forget = f
	}
	h.mu.Lock()
	if h.drivers == nil {
		h.drivers = map[*logDriver]bool{}
	}
	h.drivers[d] = true
	h.mu.Unlock()
	go func() { // ended by end, which every stdio and the host's close call
		d.err = d.cmd.Wait()
		thread.Close()
		forget()
		h.mu.Lock()
		delete(h.drivers, d)
		h.mu.Unlock()
		close(d.done)
	}()
	return nil
}

// waitReady waits until the driver has closed or written to its descriptor 5.
// One that ends before it does so by closing it too, and is an error.
func (d *logDriver) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, driverReadyTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = d.ready.SetReadDeadline(time.Unix(1, 0)) })
	n, err := d.ready.Read(make([]byte, 1))
	stop()
	d.ready.Close()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("log driver %s: not ready, it neither wrote to nor closed descriptor 5: %w%s", d.path, context.Cause(ctx), d.lastWords())
	}
	if n > 0 || !exiting(d.cmd.Process.Pid) {
		return nil
	}
	<-d.done
	why := d.err
	if why == nil {
		why = errors.New("exit status 0")
	}
	return fmt.Errorf("log driver %s: ended before it was ready: %w%s", d.path, why, d.lastWords())
}

// exiting tells whether a child is ending or has ended. The kernel marks a
// process so before it closes its descriptors, and nothing else tells a
// descriptor that was closed on purpose from one closed by the end.
func exiting(pid int) bool {
	const pfExiting = 0x4 // PF_EXITING, include/linux/sched.h
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	// Fields count from after the command's name, which may hold anything; flags is field 9 (proc(5)).
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 7 {
		return true
	}
	flags, err := strconv.ParseUint(fields[6], 10, 64)
	return err != nil || flags&pfExiting != 0
}

func (d *logDriver) lastWords() string {
	if s := d.stderr.String(); s != "" {
		return "; its stderr: " + s
	}
	return ""
}

// end waits until the driver is gone; its pipes are closed. After the timeout it
// is killed.
func (d *logDriver) end(timeout time.Duration) {
	closeAll(d.pipes[0], d.pipes[1], d.ready)
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-d.done:
	case <-timer.C:
		d.kill()
		<-d.done
	}
}

// kill ends the driver and what it has started, which is a process group of its own.
func (d *logDriver) kill() {
	if d.cmd.Process.Signal(syscall.Signal(0)) == nil { // its pid is still its own
		_ = unix.Kill(-d.cmd.Process.Pid, unix.SIGKILL) // ESRCH: it is gone
	}
}

// close ends the drivers of processes that nobody deleted, at the end of the pod.
func (h *stdioHost) close(ctx context.Context) {
	h.mu.Lock()
	var left []*logDriver
	for d := range h.drivers {
		left = append(left, d)
	}
	h.mu.Unlock()
	for _, d := range left {
		timeout := driverEndTimeout
		if t, ok := ctx.Deadline(); ok {
			timeout = min(timeout, time.Until(t))
		}
		d.end(timeout)
	}
}
