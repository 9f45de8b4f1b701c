// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/console"
)

// terminal is a pseudo-terminal with a ctr behind it.
type terminal struct {
	b    *box
	pty  console.Console
	out  chan string // what the terminal shows, piece by piece; closed at its end
	seen string
	end  chan error // ctr's end, once
	ctr  *os.Process
}

// openTerminal runs ctr as the leader of a session on a new terminal.
func (b *box) openTerminal(rows, columns uint16, args ...string) *terminal {
	b.Helper()
	pty, name, err := console.NewPty()
	if err != nil {
		b.Fatal(err)
	}
	if err := pty.Resize(console.WinSize{Height: rows, Width: columns}); err != nil {
		b.Fatal(err)
	}
	side, err := os.OpenFile(name, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	cmd := b.c.CtrCmd(ctx, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = side, side, side
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	side.Close()
	t := &terminal{b: b, pty: pty, out: make(chan string, 64), end: make(chan error, 1), ctr: cmd.Process}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		t.read()
	}()
	waited := make(chan struct{})
	go func() {
		defer close(waited)
		t.end <- cmd.Wait()
	}()
	b.Cleanup(func() {
		cancel() // ends a ctr that still runs
		<-waited
		pty.Close()
		for range t.out { // lets the reader go
		}
		<-ended
	})
	return t
}

func (t *terminal) read() {
	defer close(t.out)
	buf := make([]byte, 4096)
	for {
		n, err := t.pty.Read(buf)
		if n > 0 {
			t.out <- string(buf[:n])
		}
		if err != nil { // EIO once nobody has the other side open
			return
		}
	}
}

func (t *terminal) send(s string) {
	t.b.Helper()
	if _, err := io.WriteString(t.pty, s); err != nil {
		t.b.Fatal(err)
	}
}

// expect waits until the terminal has shown text, and forgets everything up to it.
func (t *terminal) expect(text string) {
	t.b.Helper()
	timeout := time.NewTimer(20 * time.Second)
	defer timeout.Stop()
	for {
		if _, after, ok := strings.Cut(t.seen, text); ok {
			t.seen = after
			return
		}
		select {
		case piece, ok := <-t.out:
			if !ok {
				t.b.Fatalf("the terminal ended; want %q in %q", text, t.seen)
			}
			t.seen += piece
		case <-timeout.C:
			t.b.Fatalf("want %q on the terminal, it shows %q", text, t.seen)
		}
	}
}

// resized is expect for what the terminal shows when its new size has arrived. ctr
// listens for the signal of a change only after its first size has been taken, which
// the terminal shows a moment earlier, so it is told again until it has listened.
func (t *terminal) resized(text string) {
	t.b.Helper()
	seen, told := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(told)
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				_ = t.ctr.Signal(syscall.SIGWINCH)
			case <-seen:
				return
			}
		}
	}()
	defer func() {
		close(seen)
		<-told
	}()
	t.expect(text)
}

// status waits for ctr's end.
func (t *terminal) status() int {
	t.b.Helper()
	select {
	case err := <-t.end:
		t.end <- err
		var exit interface{ ExitCode() int }
		if errors.As(err, &exit) {
			return exit.ExitCode()
		}
		if err != nil {
			t.b.Fatal(err)
		}
		return 0
	case <-time.After(20 * time.Second):
		t.b.Fatalf("ctr did not end; the terminal shows %q", t.seen)
		return -1
	}
}

// testTerminal: a terminal in the guest has the size of the one here, follows
// it, and turns the interrupt character into a signal.
func testTerminal(b *box) {
	t := b.openTerminal(31, 97, b.execArgs(podID, []string{"--tty"}, []string{"sh"})...)
	// The answers are computed, so that the echo of the question does not pass for one.
	t.send("test -t 0 && test -t 1 && test -t 2 && echo is$((1))tty; until stty size | grep .; do usleep 10000; done\n")
	t.expect("is1tty")
	t.expect("31 97")
	if err := t.pty.Resize(console.WinSize{Height: 43, Width: 141}); err != nil {
		b.Fatal(err)
	}
	// The shell's trap answers once the signal of the change has reached the guest.
	t.send("trap 'stty size; exit 5' INT; echo rea$((0))dy; while :; do sleep 1; [ \"$(stty size)\" = '43 141' ] && echo resi$((2))zed; done\n")
	t.expect("rea0dy")
	t.resized("resi2zed")
	t.send("\x03")
	t.expect("43 141")
	if got := t.status(); got != 5 {
		b.Errorf("status %d after the interrupt, want 5", got)
	}
}

// testInitTerminal: the container's first process with a terminal; what it
// prints is all there when it has ended.
func testInitTerminal(b *box) {
	b.Cleanup(func() { b.remove("terminal") })
	// ctr sets the size after the start: until then there is none, and stty says nothing.
	args := b.runArgs("terminal", []string{"--rm", "--tty", "--annotation", groupAnnotation + "=" + podID},
		[]string{"sh", "-c", "tty; until stty size 2>/dev/null | grep .; do usleep 10000; done; read a; echo go$((1))t $a; seq 1 2000; exit 6"})
	t := b.openTerminal(20, 50, args...)
	t.expect("/dev/pts/0")
	t.expect("20 50")
	t.send("hello\n")
	t.expect("go1t hello")
	t.expect("2000")
	if got := t.status(); got != 6 {
		b.Errorf("status %d, want 6", got)
	}
}
