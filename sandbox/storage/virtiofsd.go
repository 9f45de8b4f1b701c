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

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/internal/spawn"
	"github.com/kata-v2/kata/internal/tail"
)

// The daemon has a descriptor for each file that the guest knows, and for each that
// is open there.
const (
	// leastFiles is how many a daemon may have open, whatever the guest's size.
	leastFiles = 1_000_000
	// knownBytes is less than what a guest's kernel needs to know one file: an inode and
	// its name. One that has no more memory forgets files that nobody uses.
	knownBytes = 1024
)

// listenFD is the listening socket's number in the daemon.
const listenFD = 3

// DaemonOptions describe the virtio-fs daemon of one pod.
type DaemonOptions struct {
	// Path of the binary.
	Path string
	// Cache mode: auto, always, never (metadata and none are mapped where a flavour lacks them).
	Cache string
	// FileHandles says whether files that the guest knows are referred to by handles
	// instead of descriptors: "never" (or empty), "prefer", "mandatory". The daemon in
	// C knows only descriptors.
	FileHandles string
	// ExtraArgs are appended as they are.
	ExtraArgs []string
	// GuestBytes is the most memory that the guest can have.
	GuestBytes uint64
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
	files  uint64                      // how many it may have open
	enough bool                        // the guest cannot know as many
	server func() (pid int, err error) // serving, once

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

// noHandles is the value of DaemonOptions.FileHandles for none.
const noHandles = "never"

// daemonArguments is the command line of either flavour.
func daemonArguments(rust bool, o DaemonOptions, nofile uint64) []string {
	limit := strconv.FormatUint(nofile, 10)
	cache, handles := o.Cache, o.FileHandles
	if cache == "" {
		cache = "auto"
	}
	if handles == "" {
		handles = noHandles
	}
	if rust {
		return append([]string{
			"--fd=" + strconv.Itoa(listenFD), "--shared-dir=" + o.Dir, "--cache=" + cache, "--sandbox=namespace",
			"--xattr", "--announce-submounts", "--inode-file-handles=" + handles, "--seccomp=kill",
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

// keepCapabilities makes the calling thread, and what it starts, keep its
// capabilities when it takes another user's id (capabilities(7),
// SECBIT_NO_SETUID_FIXUP). The daemon in C makes a file as the guest's user and
// first group, all that FUSE tells it of them. Without capabilities the host's kernel would then
// refuse a directory that another group of the user's may write to; with them
// only the guest's kernel checks, which knows all groups. The Rust one does so by itself.
func keepCapabilities() error {
	if err := unix.Prctl(unix.PR_SET_SECUREBITS, secbitNoSetuidFixup, 0, 0, 0); err != nil {
		return fmt.Errorf("keep capabilities (it needs CAP_SETPCAP): %w", err)
	}
	return nil
}

// secbitNoSetuidFixup is SECBIT_NO_SETUID_FIXUP (include/uapi/linux/securebits.h).
const secbitNoSetuidFixup = 1 << 2

// StartDaemon starts virtiofsd on a listening socket, which it takes over.
func StartDaemon(ctx context.Context, o DaemonOptions, listener *os.File) (*Daemon, error) {
	defer listener.Close()
	rust, err := isRust(ctx, o.Path)
	if err != nil {
		return nil, fmt.Errorf("virtiofsd: %w", err)
	}
	if h := o.FileHandles; !rust && h != "" && h != noHandles {
		return nil, fmt.Errorf("virtiofsd: virtio_fs_inode_file_handles is %q: %s knows descriptors only, want %q or the Rust daemon (virtio_fs_daemon): %w", h, o.Path, noHandles, errdefs.ErrFailedPrecondition)
	}
	files, enough, err := fileLimit(o.GuestBytes)
	if err != nil {
		return nil, fmt.Errorf("virtiofsd: %w", err)
	}
	d := &Daemon{thread: spawn.NewThread(), stderr: tail.New(2048), done: make(chan struct{}), files: files, enough: enough}
	d.server = sync.OnceValues(d.serving)
	d.cmd = exec.Command(o.Path, daemonArguments(rust, o, files)...)
	d.cmd.ExtraFiles = []*os.File{listener}
	d.cmd.Stderr = d.stderr
	d.cmd.Dir = "/"
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if !rust {
		err = d.thread.Do(keepCapabilities)
	}
	if err == nil {
		err = d.thread.Start(d.cmd)
	}
	if err != nil {
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

// fileLimit is how many files the daemon of a guest of that size may have open: as
// many as the guest's memory has room for, if this host allows that.
func fileLimit(guest uint64) (limit uint64, enough bool, err error) {
	want := max(leastFiles, guest/knownBytes)
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return 0, false, fmt.Errorf("limit of open files: %w", err)
	}
	// The daemon may exceed ours, up to the kernel's own bound (proc_sys_fs(5)).
	var caps [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &caps[0]); err != nil {
		return 0, false, fmt.Errorf("capabilities: %w", err)
	}
	if caps[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0 {
		data, err := os.ReadFile("/proc/sys/fs/nr_open")
		if err == nil {
			lim.Max, err = strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
		}
		if err != nil {
			return 0, false, fmt.Errorf("fs.nr_open: %w", err)
		}
	}
	return min(want, lim.Max), want <= lim.Max, nil
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

// Files is how many files the daemon may have open; enough says that the guest has
// no memory to know as many.
func (d *Daemon) Files() (limit int, enough bool) { return int(d.files), d.enough }

// serving is the one of the daemon's processes that has the files open: it forks
// itself into its sandbox before it answers the VMM.
func (d *Daemon) serving() (pid int, err error) {
	for pid = d.PID(); ; {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid)) // proc_pid_task(5)
		if err != nil {
			return 0, fmt.Errorf("virtiofsd: %w", err)
		}
		f := strings.Fields(string(data))
		if len(f) == 0 {
			return pid, nil
		}
		if pid, err = strconv.Atoi(f[0]); err != nil {
			return 0, fmt.Errorf("virtiofsd: children: %w", err)
		}
	}
}

// Open is how many files the daemon has open. It serves already.
func (d *Daemon) Open() (int, error) {
	pid, err := d.server()
	if err != nil {
		return 0, err
	}
	dir, err := os.Open(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return 0, fmt.Errorf("virtiofsd: %w", err)
	}
	defer dir.Close()
	if st, err := dir.Stat(); err == nil && st.Size() > 0 { // since Linux 6.2
		return int(st.Size()), nil
	}
	names, err := dir.Readdirnames(-1)
	return len(names), err
}

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
