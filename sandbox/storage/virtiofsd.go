// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/internal/spawn"
	"github.com/kata-v2/kata/internal/tail"
)

// listenFD is the listening socket's number in the daemon.
const listenFD = 3

// DaemonOptions describe the virtio-fs daemon of one pod.
type DaemonOptions struct {
	// Path of the binary.
	Path string
	// Cache mode: auto, always, never (metadata and none are mapped where a flavour lacks them).
	Cache string
	// ExtraArgs are appended as they are.
	ExtraArgs []string
	// Dir is the shared directory; Socket a path for the listening socket, which
	// exists only while Listen runs.
	Dir, Socket string
	// Started is told the daemon's pid.
	Started func(name string, pid int) error
}

// Daemon is a running virtiofsd.
type Daemon struct {
	thread *spawn.Thread
	cmd    *exec.Cmd
	stderr *tail.Buffer
	done   chan struct{}

	mu       sync.Mutex
	stopping bool  // guarded by mu
	err      error // guarded by mu; set before done is closed
}

// Listen makes the daemon's socket and connects to it: the VMM can have its end
// at once, and waits for the daemon by itself.
func Listen(path string) (listener, client *os.File, err error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, nil, fmt.Errorf("virtiofsd socket: %w", err)
	}
	defer l.Close() // removes the path; the duplicate below keeps the socket
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, nil, fmt.Errorf("virtiofsd socket: %w", err)
	}
	defer c.Close()
	if client, err = c.File(); err != nil {
		return nil, nil, fmt.Errorf("virtiofsd socket: %w", err)
	}
	if listener, err = l.File(); err != nil {
		client.Close()
		return nil, nil, fmt.Errorf("virtiofsd socket: %w", err)
	}
	return listener, client, nil
}

// isRust tells the two daemons apart: the one in C names the FUSE interface
// that it was built against in its version.
func isRust(ctx context.Context, path string) (bool, error) {
	out, err := exec.CommandContext(ctx, path, "--version").CombinedOutput()
	if err != nil {
		return false, fmt.Errorf("%s --version: %w: %s", path, err, strings.TrimSpace(string(out)))
	}
	return !strings.Contains(string(out), "FUSE kernel interface"), nil
}

// daemonArguments is the command line of either flavour.
func daemonArguments(rust bool, o DaemonOptions, nofile uint64) []string {
	limit := strconv.FormatUint(nofile, 10)
	cache := o.Cache
	if cache == "" {
		cache = "auto"
	}
	if rust {
		return append([]string{
			"--fd=" + strconv.Itoa(listenFD), "--shared-dir=" + o.Dir, "--cache=" + cache, "--sandbox=namespace",
			"--xattr", "--announce-submounts", "--inode-file-handles=never", "--seccomp=kill",
			"--rlimit-nofile=" + limit, "--log-level=warn",
		}, o.ExtraArgs...)
	}
	if cache == "never" || cache == "metadata" {
		cache = "none"
	}
	return append([]string{
		"--fd=" + strconv.Itoa(listenFD), "-f", "-o", "source=" + o.Dir, "-o", "cache=" + cache, "-o", "sandbox=namespace",
		"-o", "xattr", "-o", "announce_submounts", "-o", "log_level=warn", "--rlimit-nofile=" + limit,
	}, o.ExtraArgs...)
}

// StartDaemon starts virtiofsd on a listening socket, which it takes over.
func StartDaemon(ctx context.Context, o DaemonOptions, listener *os.File) (*Daemon, error) {
	defer listener.Close()
	rust, err := isRust(ctx, o.Path)
	if err != nil {
		return nil, fmt.Errorf("virtiofsd: %w", err)
	}
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return nil, fmt.Errorf("virtiofsd: %w", err)
	}
	d := &Daemon{thread: spawn.NewThread(), stderr: tail.New(2048), done: make(chan struct{})}
	d.cmd = exec.Command(o.Path, daemonArguments(rust, o, lim.Max)...)
	d.cmd.ExtraFiles = []*os.File{listener}
	d.cmd.Stderr = d.stderr
	d.cmd.Dir = "/"
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := d.thread.Start(d.cmd); err != nil {
		d.thread.Close()
		return nil, fmt.Errorf("virtiofsd: start %s: %w", o.Path, err)
	}
	go d.wait()
	if o.Started != nil {
		if err := o.Started("virtiofsd", d.PID()); err != nil {
			d.Stop()
			return nil, fmt.Errorf("virtiofsd: %w", err)
		}
	}
	return d, nil
}

func (d *Daemon) wait() {
	err := d.cmd.Wait()
	d.thread.Close()
	d.mu.Lock()
	if !d.stopping {
		why := "exit status 0"
		if err != nil {
			why = err.Error()
		}
		if s := d.stderr.String(); s != "" {
			why += ": " + s
		}
		d.err = errors.New("virtiofsd ended: " + why)
	}
	d.mu.Unlock()
	close(d.done)
}

// PID of the daemon.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Done is closed when the daemon is gone.
func (d *Daemon) Done() <-chan struct{} { return d.done }

// Err says why the daemon ended by itself; nil before Done and after Stop.
func (d *Daemon) Err() error {
	select {
	case <-d.done:
	default:
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// Expect makes the daemon's end from now on orderly: it ends by itself when the
// VMM closes its connection.
func (d *Daemon) Expect() {
	d.mu.Lock()
	d.stopping = true
	d.mu.Unlock()
}

// Stop kills the daemon, which keeps no state of its own, and waits for it. The
// one in C forks a worker that asks for a parent-death signal only later, so the
// whole group is killed; Setsid made it the daemon's own.
func (d *Daemon) Stop() {
	d.Expect()
	select {
	case <-d.done:
		return // its group's number may be another's by now
	default:
	}
	unix.Kill(-d.PID(), unix.SIGKILL) //nolint:errcheck // gone already is fine
	<-d.done
}
