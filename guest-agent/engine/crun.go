// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/guest-agent/reaper"
)

// CrunPath is where the guest image has crun.
const CrunPath = "/usr/bin/crun"

// Crun drives crun (1.8 and compatible), which is told to leave cgroups alone:
// it is started inside the container's cgroup and everything it makes inherits it.
type Crun struct {
	root    string // its state directory
	reaper  *reaper.Reaper
	program func() (string, error)
}

var _ Engine = (*Crun)(nil)

// NewCrun uses the binary at path and keeps state below root.
func NewCrun(path, root string, r *reaper.Reaper) *Crun {
	return &Crun{root: root, reaper: r, program: program(path)}
}

// Prepare does what the first call would do else: it loads the engine into memory.
func (c *Crun) Prepare() error {
	_, err := c.program()
	return err
}

// Create implements Engine.
func (c *Crun) Create(ctx context.Context, cr Create) (*Process, error) {
	cfg, err := json.Marshal(cr.Spec)
	if err != nil {
		return nil, fmt.Errorf("encode config.json: %w", err)
	}
	if err := os.WriteFile(filepath.Join(cr.Bundle, "config.json"), cfg, 0o600); err != nil {
		return nil, err
	}
	return c.spawn(ctx, job{
		what: "create container", dir: cr.Bundle, name: "init", cgroup: cr.Cgroup, stdio: cr.Stdio,
		terminal: cr.Spec.Process.Terminal,
		args:     []string{"create", "--bundle", cr.Bundle}, id: cr.ID,
	})
}

// Exec implements Engine.
func (c *Crun) Exec(ctx context.Context, e Exec) (*Process, error) {
	spec, err := json.Marshal(e.Spec)
	if err != nil {
		return nil, fmt.Errorf("encode process: %w", err)
	}
	file := filepath.Join(e.Bundle, e.Name+".json")
	if err := os.WriteFile(file, spec, 0o600); err != nil {
		return nil, err
	}
	defer os.Remove(file)
	return c.spawn(ctx, job{
		what: "exec", dir: e.Bundle, name: e.Name, cgroup: e.Cgroup, stdio: e.Stdio, terminal: e.Spec.Terminal,
		args: []string{"exec", "--detach", "--process", file}, id: e.ID,
	})
}

// Start implements Engine. What `crun start` does beyond running hooks is to
// write one byte to a FIFO, so that is done here without a process.
func (c *Crun) Start(ctx context.Context, id string, hooks bool) error {
	if hooks {
		return c.run(ctx, "start container", "", "start", id)
	}
	path := filepath.Join(c.root, id, "exec.fifo")
	// Non-blocking: with nobody reading the init is dead, and open says ENXIO.
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENXIO) || errors.Is(err, fs.ErrNotExist) {
		return fault.New(fault.FailedPrecondition, "start container %s: its init process is not waiting: %w", id, err)
	}
	if err != nil {
		return fmt.Errorf("start container %s: %w", id, err)
	}
	defer f.Close()
	// The name is how crun tells created from running.
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("start container %s: %w", id, err)
	}
	if _, err := f.Write([]byte{0}); err != nil {
		return fmt.Errorf("start container %s: %w", id, err)
	}
	return nil
}

// Delete implements Engine. With no hooks to run, a dead container is only a directory.
func (c *Crun) Delete(ctx context.Context, id string, hooks bool) error {
	dir := filepath.Join(c.root, id)
	if hooks {
		if _, err := os.Stat(dir); err == nil {
			return c.run(ctx, "delete container", "", "delete", "--force", id)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("delete container %s: %w", id, err)
	}
	return nil
}

// job is one call of crun that leaves a process behind.
type job struct {
	what, dir, name string
	args            []string
	id              string
	cgroup          *os.File
	stdio           []uintptr
	terminal        bool
}

// spawn runs crun and claims the process that it leaves.
func (c *Crun) spawn(ctx context.Context, j job) (*Process, error) {
	pidFile := filepath.Join(j.dir, j.name+".pid")
	args := append(j.args, "--pid-file", pidFile)
	var console *consoleSocket
	if j.terminal {
		var err error
		if console, err = listenConsole(filepath.Join(j.dir, j.name+".sock")); err != nil {
			return nil, fmt.Errorf("%s: console socket: %w", j.what, err)
		}
		defer console.close()
		args = append(args, "--console-socket", console.path)
	}
	defer os.Remove(pidFile)
	launch := c.reaper.Launch()
	defer launch.Done()
	if err := c.call(ctx, j, append(args, j.id)); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(pidFile)
	if err != nil {
		return nil, fmt.Errorf("%s: pid file: %w", j.what, err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return nil, fmt.Errorf("%s: pid file holds %q: want a number above 1", j.what, b)
	}
	p := NewProcess(pid, launch.Claim(pid), nil)
	if console != nil {
		if p.Console, err = console.receive(); err != nil {
			_ = p.Signal(unix.SIGKILL) // without its terminal it is of no use
			p.Release()
			return nil, fmt.Errorf("%s: terminal: %w", j.what, err)
		}
	}
	return p, nil
}

// run is a call of crun that leaves nothing behind and has no stdio.
func (c *Crun) run(ctx context.Context, what, dir string, args ...string) error {
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	if dir == "" {
		dir = os.TempDir()
	}
	tmp, err := os.MkdirTemp(dir, "crun-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	fd := null.Fd()
	return c.call(ctx, job{what: what, dir: tmp, name: "run", stdio: []uintptr{fd, fd, fd}}, args)
}

// call runs crun to its end. Its messages go to a file: its stderr is the container's.
func (c *Crun) call(ctx context.Context, j job, args []string) error {
	path, err := c.program()
	if err != nil {
		return fmt.Errorf("%s: %w", j.what, err)
	}
	logFile := filepath.Join(j.dir, j.name+".log")
	defer os.Remove(logFile)
	argv := append([]string{"crun", "--root", c.root, "--cgroup-manager=disabled", "--log", "file:" + logFile}, args...)
	pidfd := -1
	attr := &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Files: j.stdio,
		Sys:   &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd},
	}
	if j.cgroup != nil {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, int(j.cgroup.Fd())
	}
	began := time.Now()
	pid, exit, err := c.reaper.Start(path, argv, attr)
	if pidfd >= 0 {
		defer unix.Close(pidfd)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", j.what, err)
	}
	var st reaper.Status
	select {
	case st = <-exit:
	case <-ctx.Done():
		doing := endTree(pid, pidfd)
		<-exit
		return fmt.Errorf("%s: OCI engine given up after %v (%s): %w", j.what, time.Since(began).Round(time.Millisecond), doing, context.Cause(ctx))
	}
	if st.Code == 0 {
		return nil
	}
	return fault.New(fault.FailedPrecondition, "%s: %s", j.what, message(logFile, st))
}

// message is what crun said, or how it ended when it said nothing.
func message(logFile string, st reaper.Status) string {
	const most = 4096 // file names in it may come from a hostile image
	b, err := os.ReadFile(logFile)
	b = bytes.TrimSpace(b)
	if err != nil || len(b) == 0 {
		if st.Signaled {
			return fmt.Sprintf("OCI engine killed by signal %d without a message", st.Code-128)
		}
		return fmt.Sprintf("OCI engine failed with status %d without a message", st.Code)
	}
	if len(b) > most {
		b = b[len(b)-most:]
	}
	return strings.ToValidUTF8(strings.ReplaceAll(string(b), "\n", "; "), "?")
}
