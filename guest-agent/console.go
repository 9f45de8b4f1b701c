// SPDX-License-Identifier: Apache-2.0

package guestagent

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/agentlog"
	"github.com/kata-v2/kata/guest-agent/vsocket"
)

var shells = []string{"/bin/bash", "/bin/sh", "/usr/bin/bash", "/usr/bin/sh"}

// debugConsole serves a shell of the guest image on the console's vsock port, or
// runs one on /dev/console.
func (a *agent) debugConsole(ctx context.Context) {
	shell := ""
	for _, s := range shells {
		if _, err := os.Stat(s); err == nil {
			shell = s
			break
		}
	}
	if shell == "" {
		a.log.Warn("debug console: the guest image has no shell")
		return
	}
	if port := a.params.DebugConsolePort; port != 0 {
		a.serveOn(port, func(l net.Listener) { a.consoles(ctx, l, shell) })
		return
	}
	a.goRun(func() {
		tty, err := os.OpenFile("/dev/console", os.O_RDWR, 0)
		if err == nil {
			defer tty.Close()
			err = a.shell(ctx, shell, tty)
		}
		if err != nil {
			a.log.Warn("debug console", agentlog.KeyError, err.Error())
		}
	})
}

func (a *agent) consoles(ctx context.Context, l net.Listener, shell string) {
	vsocket.Serve(ctx, l, func(c net.Conn) {
		defer c.Close()
		if err := a.consoleOn(ctx, c, shell); err != nil {
			a.log.Warn("debug console", agentlog.KeyError, err.Error())
		}
	})
}

// consoleOn runs a shell on a terminal of its own and carries it over c.
func (a *agent) consoleOn(ctx context.Context, c net.Conn, shell string) error {
	ptm, pts, err := openPTY()
	if err != nil {
		return err
	}
	defer ptm.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Add(2)
	go func() { defer wg.Done(); _, _ = io.Copy(c, ptm) }()
	go func() {
		defer wg.Done()
		_, _ = io.Copy(ptm, c)
		ptm.Close() // the peer left: the shell gets a hang-up
	}()
	defer c.Close() // ends the second copy
	defer pts.Close()
	return a.shell(ctx, shell, pts)
}

// shell runs until it ends or ctx is done.
func (a *agent) shell(ctx context.Context, shell string, tty *os.File) error {
	pidfd := -1
	fd := tty.Fd()
	_, exit, err := a.reaper.Start(shell, []string{shell}, &syscall.ProcAttr{
		Dir: "/", Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TERM=linux", "HOME=/"},
		Files: []uintptr{fd, fd, fd}, Sys: &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0, PidFD: &pidfd},
	})
	if pidfd >= 0 {
		defer unix.Close(pidfd)
	}
	if err != nil {
		return err
	}
	select {
	case <-exit:
	case <-ctx.Done():
		_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
		<-exit
	}
	return nil
}

// openPTY makes a terminal (pty(7)); the master is in the runtime's poller.
func openPTY() (ptm, pts *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("terminal: %w", err)
	}
	ptm = os.NewFile(uintptr(fd), "ptmx")
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		ptm.Close()
		return nil, nil, fmt.Errorf("terminal: unlock: %w", err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		ptm.Close()
		return nil, nil, fmt.Errorf("terminal: number: %w", err)
	}
	pts, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		ptm.Close()
		return nil, nil, fmt.Errorf("terminal: %w", err)
	}
	return ptm, pts, nil
}
