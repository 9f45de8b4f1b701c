// SPDX-License-Identifier: Apache-2.0

package streams

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// stdio is a process with pipes, which the test is, and its host.
type stdio struct {
	*testing.T
	s         *Set
	stdin     *os.File // the process's
	stdout    *os.File
	in, out   net.Conn // the host's
	gin, gout net.Conn // the guest's
}

// duplex is a connection whose ends can be ended one way.
func duplex(t *testing.T) (host, guest net.Conn) {
	t.Helper()
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var out [2]net.Conn
	for i, fd := range p {
		f := os.NewFile(uintptr(fd), "duplex")
		out[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { out[0].Close(); out[1].Close() })
	return out[0], out[1]
}

func newStdio(t *testing.T) *stdio {
	t.Helper()
	p := &stdio{T: t}
	p.in, p.gin = duplex(t)
	p.out, p.gout = duplex(t)
	s, err := New(Config{Stdin: p.gin, Stdout: p.gout})
	if err != nil {
		t.Fatal(err)
	}
	p.s = s
	dup := func(i int) *os.File {
		fd, err := unix.Dup(int(s.Child()[i]))
		if err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fd), "process")
	}
	p.stdin, p.stdout = dup(0), dup(1)
	s.Started(nil)
	t.Cleanup(func() {
		p.stdin.Close()
		p.stdout.Close()
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		s.Close(ctx)
	})
	return p
}

// park parks as a host does, and returns the rest of the output.
func (p *stdio) park() string {
	p.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	p.s.BeginPark()
	done := make(chan error, 1)
	go func() { done <- p.s.Park(ctx) }()
	if err := p.in.(*net.UnixConn).CloseWrite(); err != nil {
		p.Fatal(err)
	}
	rest, err := io.ReadAll(p.out)
	if err != nil {
		p.Fatal(err)
	}
	if err := <-done; err != nil {
		p.Fatal(err)
	}
	return string(rest)
}

// attach is the next host.
func (p *stdio) attach() {
	p.Helper()
	p.in, p.gin = duplex(p.T)
	p.out, p.gout = duplex(p.T)
	if err := p.s.Attach(p.gin, p.gout, nil); err != nil {
		p.Fatal(err)
	}
}

func (p *stdio) read(from io.Reader, want string) {
	p.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(from, got); err != nil || string(got) != want {
		p.Fatalf("got %q, %v; want %q", got, err, want)
	}
}

func (p *stdio) write(to io.Writer, text string) {
	p.Helper()
	if _, err := io.WriteString(to, text); err != nil {
		p.Fatal(err)
	}
}

// Nothing is lost between hosts, in either direction, and the process meets no end.
func TestParkAndAttach(t *testing.T) {
	p := newStdio(t)
	p.write(p.stdout, "one")
	p.read(p.out, "one")
	p.write(p.in, "first")
	p.read(p.stdin, "first")
	for range 3 {
		if rest := p.park(); rest != "" {
			t.Fatalf("more output: %q", rest)
		}
		p.write(p.stdout, "while nobody reads")
		p.attach()
		p.read(p.out, "while nobody reads")
		p.write(p.in, "again")
		p.read(p.stdin, "again")
	}
	p.in.Close()
	if rest, err := io.ReadAll(p.stdin); err != nil || len(rest) > 0 {
		t.Errorf("after the end of stdin the process reads %q, %v", rest, err)
	}
	p.stdout.Close()
	if rest, err := io.ReadAll(p.out); err != nil || len(rest) > 0 {
		t.Errorf("after the end of stdout the host reads %q, %v", rest, err)
	}
}

// Input that the process does not read is kept while its pipe is full.
func TestParkKeepsInput(t *testing.T) {
	p := newStdio(t)
	sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<14) // 256 KiB, four pipes
	wrote := make(chan error, 1)
	go func() { _, err := p.in.Write(sent); wrote <- err }()
	first := make([]byte, 100)
	if _, err := io.ReadFull(p.stdin, first); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	parked := make(chan error, 1)
	go func() { parked <- p.s.Park(ctx) }()
	if err := <-wrote; err != nil { // only a parked Set takes all of it
		t.Fatal(err)
	}
	if err := p.in.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if err := <-parked; err != nil {
		t.Fatal(err)
	}
	p.attach()
	p.write(p.in, "end")
	p.in.Close()
	rest, err := io.ReadAll(p.stdin)
	if got := string(first) + string(rest); err != nil || got != string(sent)+"end" {
		t.Errorf("%d bytes, %v; want %d", len(got), err, len(sent)+3)
	}
}

// A stream that ended before the next host came is ended for that one too.
func TestParkEnded(t *testing.T) {
	p := newStdio(t)
	p.write(p.stdout, "last")
	p.stdout.Close()
	first := p.park() // its end may not have been seen by then
	p.attach()
	next, err := io.ReadAll(p.out)
	if got := first + string(next); err != nil || got != "last" {
		t.Errorf("output %q, %v", got, err)
	}
	<-p.s.Drained()
	first = p.park()
	p.attach()
	if next, err = io.ReadAll(p.out); err != nil || first != "" || len(next) > 0 {
		t.Errorf("a host after the end reads %q, %v", next, err)
	}
}

// The next host may have no use for the streams.
func TestAttachWithout(t *testing.T) {
	p := newStdio(t)
	p.park()
	if err := p.s.Attach(nil, nil, nil); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(p.stdin); err != nil || len(rest) > 0 {
		t.Errorf("stdin: %q, %v", rest, err)
	}
	p.write(p.stdout, string(make([]byte, 1<<20))) // more than a pipe holds
	p.stdout.Close()
	<-p.s.Drained()
}

// A Set can be closed while it is parked, and refuses connections that nobody awaits.
func TestParkedClose(t *testing.T) {
	p := newStdio(t)
	host, guest := duplex(t)
	if err := p.s.Attach(guest, nil, nil); err == nil {
		t.Error("attached to what is not parked")
	}
	if _, err := host.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the connection is not closed: %v", err)
	}
	p.park()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	p.s.Close(ctx)
	host, guest = duplex(t)
	if err := p.s.Attach(guest, nil, nil); err != nil {
		t.Error(err)
	}
	if _, err := host.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the connection is not closed: %v", err)
	}
}

// A terminal is parked like pipes are.
func TestParkTerminal(t *testing.T) {
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	console := os.NewFile(uintptr(master), "console")
	if err := unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(master, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := &stdio{T: t, stdin: tty, stdout: tty}
	p.in, p.gin = duplex(t)
	p.out, p.gout = duplex(t)
	if p.s, err = New(Config{Stdin: p.gin, Stdout: p.gout, Terminal: true}); err != nil {
		t.Fatal(err)
	}
	p.s.Started(console)
	p.write(tty, "one")
	p.read(p.out, "one")
	for range 2 {
		p.park()
		p.write(tty, "two")
		p.attach()
		p.read(p.out, "two")
		p.write(p.in, "three\n")
		p.read(tty, "three\n")
		p.read(p.out, "three\r\n") // the echo
	}
	tty.Close()
	if rest, err := io.ReadAll(p.out); err != nil || len(rest) > 0 {
		t.Errorf("after the terminal's end the host reads %q, %v", rest, err)
	}
	p.s.Close(context.Background())
}
