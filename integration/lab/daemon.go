// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// rootEnv marks every process of a lab: the daemon's environment is inherited
// by the shims and by what they start.
const rootEnv = "KATA_LAB_ROOT"

// daemon is one running containerd process.
type daemon struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when the process is gone
	err  error         // valid after done
	logs sync.WaitGroup
	pipe *os.File // read end of the daemon's output
}

func (c *Containerd) notifySocket() string { return filepath.Join(c.Root, "n.sock") }

// startDaemon runs containerd until it says READY=1 (sd_notify(3)).
func (c *Containerd) startDaemon(ctx context.Context) error {
	_ = os.Remove(c.notifySocket())
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: c.notifySocket(), Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("lab: notify socket: %w", err)
	}
	defer os.Remove(c.notifySocket())
	ready := make(chan struct{})
	var reader sync.WaitGroup
	reader.Go(func() { awaitReady(notify, ready) })
	defer reader.Wait()
	defer notify.Close()

	d, err := c.spawn()
	if err != nil {
		return err
	}
	select {
	case <-ready:
	case <-d.done:
		d.closeLogs() // with it, what the daemon said last has been read
		return fmt.Errorf("lab: containerd ended before it served: %w; its last lines:\n%s", d.err, c.log.tail(15))
	case <-ctx.Done():
		err := d.kill()
		return errors.Join(fmt.Errorf("lab: containerd did not serve in time: %w; its last lines:\n%s", ctx.Err(), c.log.tail(15)), err)
	}
	c.mu.Lock()
	c.daemon = d
	c.mu.Unlock()
	return nil
}

// awaitReady closes ready when the daemon announces itself; it ends when conn closes.
func awaitReady(conn *net.UnixConn, ready chan<- struct{}) {
	buf := make([]byte, 4096)
	for announced := false; ; {
		n, err := conn.Read(buf)
		if err != nil {
			return
		}
		if !announced && strings.Contains(string(buf[:n]), "READY=1") {
			announced = true
			close(ready)
		}
	}
}

func (c *Containerd) spawn() (*daemon, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("lab: log pipe: %w", err)
	}
	defer w.Close()
	cmd := exec.Command(filepath.Join(c.dir, "containerd"), "--config", c.configFile(), "--root", c.rootDir(), "--state", c.stateDir(), "--address", c.Address)
	cmd.Env = append(os.Environ(), "PATH="+c.path, "NOTIFY_SOCKET="+c.notifySocket(), rootEnv+"="+c.Root)
	if c.opts.ConfigFile != "" {
		cmd.Env = append(cmd.Env, "KATA_CONF_FILE="+c.opts.ConfigFile)
	}
	cmd.Env = append(cmd.Env, c.opts.Env...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = c.Root, w, w
	// The daemon dies with the test that started it, however that ends.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	d := &daemon{cmd: cmd, done: make(chan struct{}), pipe: r}
	started := make(chan error, 1)
	go func() {
		// The parent-death signal comes when the forking thread ends, so this
		// goroutine keeps its thread for as long as the daemon lives.
		runtime.LockOSThread()
		defer close(d.done)
		start := cmd.Start
		if c.net != nil { // its thread outlives the daemon as well
			start = func() error { return c.net.thread.Start(cmd) }
		}
		err := start()
		started <- err
		if err == nil {
			d.err = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		r.Close()
		return nil, fmt.Errorf("lab: start containerd: %w", err)
	}
	d.logs.Go(func() { c.log.copyLines(r) })
	return d, nil
}

// terminate asks the daemon to end, and kills it after grace.
func (d *daemon) terminate(grace time.Duration) error {
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-d.done:
		d.closeLogs()
		return nil
	case <-timer.C:
		return errors.Join(fmt.Errorf("containerd did not end within %v of SIGTERM", grace), d.kill())
	}
}

func (d *daemon) kill() error {
	if err := d.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill containerd: %w", err)
	}
	<-d.done
	d.closeLogs()
	return nil
}

// closeLogs ends the log reader. A shim may hold the other end open, so the end
// of the daemon is not the end of the pipe: what is in it by now is read, no more.
func (d *daemon) closeLogs() {
	_ = d.pipe.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	d.logs.Wait()
	d.pipe.Close()
}

// logBuffer keeps the lines of all daemons of one lab.
type logBuffer struct {
	mu    sync.Mutex
	lines []string
	grown chan struct{} // closed and renewed at each line
	tee   io.Writer
}

func newLogBuffer(tee io.Writer) *logBuffer {
	return &logBuffer{grown: make(chan struct{}), tee: tee}
}

func (l *logBuffer) copyLines(r io.Reader) {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 64<<10), 4<<20)
	for s.Scan() {
		l.add(s.Text())
	}
}

func (l *logBuffer) add(line string) {
	l.mu.Lock()
	l.lines = append(l.lines, line)
	close(l.grown)
	l.grown = make(chan struct{})
	l.mu.Unlock()
	if l.tee != nil {
		_, _ = io.WriteString(l.tee, line+"\n")
	}
}

// from returns the lines after the first n, and a channel that closes when there are more.
func (l *logBuffer) from(n int) ([]string, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lines[n:len(l.lines):len(l.lines)], l.grown
}

func (l *logBuffer) tail(n int) string {
	lines, _ := l.from(0)
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// Log returns everything that the daemon and its shims have logged so far.
func (c *Containerd) Log() []string {
	lines, _ := c.log.from(0)
	return lines
}

// WaitLog returns the first logged line, from the daemon's first on, for which
// match is true; it waits for it until ctx is done.
func (c *Containerd) WaitLog(ctx context.Context, match func(string) bool) (string, error) {
	for n := 0; ; {
		lines, grown := c.log.from(n)
		for _, line := range lines {
			if match(line) {
				return line, nil
			}
		}
		n += len(lines)
		select {
		case <-grown:
		case <-ctx.Done():
			return "", fmt.Errorf("lab: no such line in the daemon's log: %w", ctx.Err())
		}
	}
}
