// SPDX-License-Identifier: Apache-2.0

package streams

import (
	"bytes"
	"errors"
	"io"
	"math/rand"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// spliced is a pipe, a pair of sockets and what moves the one into the other.
type spliced struct {
	w, r      *os.File // the pipe
	near, far *net.UnixConn
	s         *splicer
}

func newSpliced(t *testing.T) *spliced {
	t.Helper()
	x := &spliced{}
	var err error
	if x.r, x.w, err = os.Pipe(); err != nil {
		t.Fatal(err)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i, to := range []**net.UnixConn{&x.near, &x.far} {
		f := os.NewFile(uintptr(fds[i]), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		*to = c.(*net.UnixConn)
	}
	t.Cleanup(func() { x.w.Close(); x.r.Close(); x.near.Close(); x.far.Close() })
	src, err := x.r.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	dst, err := x.near.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	x.s = &splicer{dst: dst, src: src, taken: new(tally), move: splice}
	return x
}

// ran is what run returned.
type ran struct {
	ended bool
	err   error
}

func (x *spliced) run() <-chan ran {
	done := make(chan ran, 1)
	go func() {
		ended, err := x.s.run()
		x.near.Close()
		done <- ran{ended, err}
	}()
	return done
}

// Everything arrives in order through a socket that holds less than is written.
func TestSplice(t *testing.T) {
	x := newSpliced(t)
	want := make([]byte, 5<<20+12345)
	rand.New(rand.NewSource(1)).Read(want)
	done := x.run()
	go func() {
		defer x.w.Close()
		for b, n := want, 1; len(b) > 0; n = n*3%100003 + 1 {
			n = min(n, len(b))
			if _, err := x.w.Write(b[:n]); err != nil {
				t.Error(err)
				return
			}
			b = b[n:]
		}
	}()
	got, err := io.ReadAll(x.far)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d of %d bytes arrived, equal=%v, %v", len(got), len(want), bytes.Equal(got, want), err)
	}
	if r := <-done; !r.ended || r.err != nil {
		t.Errorf("%+v", r)
	}
}

// A deadline of the pipe interrupts, whichever side is waited for, and loses nothing.
func TestSpliceDeadline(t *testing.T) {
	x := newSpliced(t)
	done := x.run()
	if err := x.r.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if r := <-done; r.ended || !errors.Is(r.err, os.ErrDeadlineExceeded) {
		t.Errorf("%+v", r)
	}
	if _, err := x.w.WriteString("kept"); err != nil {
		t.Fatal(err)
	}
	if err := x.r.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 8)
	if n, err := x.r.Read(b); err != nil || string(b[:n]) != "kept" {
		t.Errorf("%q, %v", b[:n], err)
	}
}

// While the socket takes nothing the pipe can be closed, and the socket's end ends it.
func TestSpliceFull(t *testing.T) {
	x := newSpliced(t)
	if err := x.near.SetWriteBuffer(4096); err != nil {
		t.Fatal(err)
	}
	tries := make(chan error)
	x.s.move = func(from, to uintptr) (int, error) {
		n, err := splice(from, to)
		tries <- err
		return n, err
	}
	done := x.run()
	go func() {
		b := make([]byte, 4096)
		for {
			if _, err := x.w.Write(b); err != nil {
				return
			}
		}
	}()
	// The first of the two is where the pipe is tried, the second the socket alone.
	for full := 0; full < 2; {
		if err := <-tries; err == unix.EAGAIN {
			full++
		} else {
			full = 0
		}
	}
	go func() {
		for range tries {
		}
	}()
	if err := x.r.Close(); err != nil { // must not wait for the socket
		t.Fatal(err)
	}
	x.far.Close()
	if r := <-done; r.ended {
		t.Errorf("%+v", r)
	}
	close(tries)
}

// What the kernel does not splice is copied from where it stopped.
func TestSpliceRefused(t *testing.T) {
	x := newSpliced(t)
	calls := 0
	x.s.move = func(from, to uintptr) (int, error) {
		if calls++; calls > 1 {
			return 0, syscall.EINVAL
		}
		return splice(from, to)
	}
	if _, err := x.w.WriteString("first"); err != nil {
		t.Fatal(err)
	}
	if n, err, refused := x.s.some(); n != 5 || err != nil || refused != nil {
		t.Fatalf("%d, %v, %v", n, err, refused)
	}
	if _, err := x.w.WriteString("second"); err != nil {
		t.Fatal(err)
	}
	if ended, err := x.s.run(); ended || err != nil {
		t.Errorf("%v, %v", ended, err)
	}
	x.w.Close()
	if err := copyStream(x.near, x.r, new(tally)); err != nil {
		t.Error(err)
	}
	x.near.Close()
	if got, err := io.ReadAll(x.far); err != nil || string(got) != "firstsecond" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestAtLeast(t *testing.T) {
	for release, want := range map[string]bool{
		"6.5.0": true, "6.12.117-kata": true, "7.0.1": true, "10.0.0": true,
		"6.4.16": false, "6.1.0-54-cloud-amd64": false, "5.15.0": false, "6": false, "": false, "x.y.z": false,
	} {
		if atLeast(release, 6, 5) != want {
			t.Errorf("%q: %v", release, !want)
		}
	}
}
