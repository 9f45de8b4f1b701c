// SPDX-License-Identifier: Apache-2.0

package streams

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols"
)

func hub(t *testing.T) (*Hub, func(id uint32) net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	h := NewHub()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); h.Serve(ctx, l, ByPreamble) }()
	t.Cleanup(func() { cancel(); <-done })
	return h, func(id uint32) net.Conn {
		c, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if _, err := c.Write(binary.LittleEndian.AppendUint32([]byte(protocols.StreamIDMagic), id)); err != nil {
			t.Fatal(err)
		}
		return c
	}
}

func ctx(t *testing.T, d time.Duration) context.Context {
	c, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return c
}

func TestPairing(t *testing.T) {
	h, dial := hub(t)
	a, b := dial(7), dial(8)
	for id, want := range map[uint32]net.Conn{8: b, 7: a} {
		got, err := h.Take(ctx(t, 5*time.Second), id)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := want.Write([]byte{byte(id)}); err != nil {
			t.Fatal(err)
		}
		one := make([]byte, 1)
		if _, err := io.ReadFull(got, one); err != nil || one[0] != byte(id) {
			t.Errorf("stream %d: %v, %v", id, one, err)
		}
		got.Close()
	}
}

func TestTakeBeforeTheConnection(t *testing.T) {
	h, dial := hub(t)
	got := make(chan error, 1)
	go func() {
		c, err := h.Take(ctx(t, 5*time.Second), 9)
		if err == nil {
			c.Close()
		}
		got <- err
	}()
	dial(9)
	if err := <-got; err != nil {
		t.Fatal(err)
	}
}

func TestNobodyConnects(t *testing.T) {
	h, dial := hub(t)
	_, err := h.Take(ctx(t, 10*time.Millisecond), 10)
	if fault.KindOf(err) != fault.InvalidArgument || !strings.Contains(err.Error(), "10") {
		t.Errorf("got %v", err)
	}
	if len(h.waiting) != 0 {
		t.Error("still waiting")
	}
	c := dial(11)
	if _, err := c.Write(nil); err != nil {
		t.Fatal(err)
	}
}

func TestWrongPreambleIsClosed(t *testing.T) {
	h, _ := hub(t)
	a, b := net.Pipe()
	go func() { _, _ = a.Write([]byte("GET / HT")) }()
	if _, err := ByPreamble(b); err == nil {
		t.Error("accepted")
	}
	_ = h
}

// pair is a connected Unix socket: ours for the Set, theirs for the host.
func pair(t *testing.T) (ours, theirs *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var out [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		out[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return out[0], out[1]
}

// process plays a process: it takes its descriptors before Started closes them.
func process(t *testing.T, s *Set) [3]*os.File {
	t.Helper()
	var out [3]*os.File
	for i, fd := range s.Child() {
		n, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			t.Fatal(err)
		}
		out[i] = os.NewFile(uintptr(n), "stdio")
	}
	return out
}

func TestStreamsCarryAndEnd(t *testing.T) {
	in, hin := pair(t)
	out, hout := pair(t)
	errc, herr := pair(t)
	s, err := New(Config{Stdin: in, Stdout: out, Stderr: errc})
	if err != nil {
		t.Fatal(err)
	}
	p := process(t, s)
	s.Started(nil)
	big := bytes.Repeat([]byte("x1y2"), 100_000)
	var wg sync.WaitGroup
	wg.Add(2)
	go func() { defer wg.Done(); _, _ = hin.Write(big); _ = hin.CloseWrite() }()
	go func() { // cat
		defer wg.Done()
		_, _ = io.Copy(p[1], p[0])
		_, _ = p[2].WriteString("bye")
		p[0].Close()
		p[1].Close()
		p[2].Close()
	}()
	got, err := io.ReadAll(hout)
	if err != nil || !bytes.Equal(got, big) {
		t.Errorf("%d bytes of %d, %v", len(got), len(big), err)
	}
	if e, _ := io.ReadAll(herr); string(e) != "bye" {
		t.Errorf("stderr %q", e)
	}
	wg.Wait()
	<-s.Drained()
	s.Close(context.Background())
}

func TestDescendantHoldsStdout(t *testing.T) {
	in, hin := pair(t)
	out, hout := pair(t)
	s, err := New(Config{Stdin: in, Stdout: out})
	if err != nil {
		t.Fatal(err)
	}
	p := process(t, s)
	s.Started(nil)
	s.Exited()
	if _, err := hin.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("stdin after the exit: %v", err)
	}
	if _, err := p[1].WriteString("late"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.Drained():
		t.Error("drained while a descendant holds stdout")
	default:
	}
	p[1].Close()
	if got, _ := io.ReadAll(hout); string(got) != "late" {
		t.Errorf("stdout %q", got)
	}
	s.Close(context.Background())
}

// TestWritten: what was written counts at once, wherever on its way it is.
func TestWritten(t *testing.T) {
	out, hout := pair(t)
	errc, herr := pair(t)
	s, err := New(Config{Stdout: out, Stderr: errc})
	if err != nil {
		t.Fatal(err)
	}
	p := process(t, s)
	s.Started(nil)
	var hosts sync.WaitGroup
	for _, h := range []io.Reader{hout, herr} {
		hosts.Go(func() { _, _ = io.Copy(io.Discard, h) })
	}
	var want [2]uint64
	for i := range 2000 {
		n := 1 + i*37%5000
		if _, err := p[1+i%2].Write(make([]byte, n)); err != nil {
			t.Fatal(err)
		}
		want[i%2] += uint64(n)
		if got := s.Written(); got != want {
			t.Fatalf("written: %v, want %v", got, want)
		}
	}
	for _, f := range p {
		f.Close()
	}
	<-s.Drained()
	s.Close(context.Background())
	hosts.Wait()
	if got := s.Written(); got != want {
		t.Errorf("after the end: %v, want %v", got, want)
	}
}

func TestHostGoneDoesNotStopTheProcess(t *testing.T) {
	out, hout := pair(t)
	s, err := New(Config{Stdout: out})
	if err != nil {
		t.Fatal(err)
	}
	p := process(t, s)
	s.Started(nil)
	hout.Close()
	if _, err := p[1].Write(make([]byte, 1<<20)); err != nil {
		t.Errorf("the process cannot write: %v", err)
	}
	p[1].Close()
	<-s.Drained()
	s.Close(context.Background())
}

func TestCloseIsBounded(t *testing.T) {
	out, _ := pair(t)
	s, err := New(Config{Stdout: out})
	if err != nil {
		t.Fatal(err)
	}
	p := process(t, s)
	defer p[1].Close()
	s.Started(nil)
	s.Close(ctx(t, 20*time.Millisecond)) // a writer is left, nobody reads
}

func TestPolling(t *testing.T) {
	s, err := New(Config{Poll: true})
	if err != nil {
		t.Fatal(err)
	}
	p := process(t, s)
	s.Started(nil)
	if n, err := s.Write(context.Background(), []byte("abc")); n != 3 || err != nil {
		t.Fatal(n, err)
	}
	s.CloseStdin()
	if b, err := io.ReadAll(p[0]); string(b) != "abc" || err != nil {
		t.Errorf("stdin %q, %v", b, err)
	}
	if _, err := s.Read(ctx(t, 10*time.Millisecond), false, 10); err == nil {
		t.Error("a read without output returned")
	}
	if _, err := p[1].WriteString("0123456789"); err != nil {
		t.Fatal(err)
	}
	p[1].Close()
	p[2].Close()
	s.Exited()
	var got []byte
	for {
		b, err := s.Read(context.Background(), false, 4)
		if err != nil {
			t.Fatal(err)
		}
		if len(b) == 0 {
			break
		}
		got = append(got, b...)
	}
	if string(got) != "0123456789" {
		t.Errorf("stdout %q", got)
	}
	if b, err := s.Read(context.Background(), true, 4); len(b) != 0 || err != nil {
		t.Errorf("stderr %q, %v", b, err)
	}
	<-s.Drained()
	s.Close(context.Background())
}

func TestTerminal(t *testing.T) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	ptm := os.NewFile(uintptr(fd), "ptmx")
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	pts, err := os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	in, hin := pair(t)
	out, hout := pair(t)
	s, err := New(Config{Stdin: in, Stdout: out, Terminal: true})
	if err != nil {
		t.Fatal(err)
	}
	s.Started(ptm)
	if err := s.Resize(30, 90); err != nil {
		t.Fatal(err)
	}
	ws, err := unix.IoctlGetWinsize(int(pts.Fd()), unix.TIOCGWINSZ)
	if err != nil || ws.Row != 30 || ws.Col != 90 {
		t.Errorf("size %v, %v", ws, err)
	}
	if _, err := hin.Write([]byte("hi\n")); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 3)
	if _, err := io.ReadFull(pts, line); err != nil || string(line) != "hi\n" {
		t.Errorf("line %q, %v", line, err)
	}
	s.CloseStdin() // must not end a terminal
	if _, err := pts.WriteString("out"); err != nil {
		t.Fatal(err)
	}
	pts.Close()
	if got, _ := io.ReadAll(hout); string(got) != "hi\r\nout" {
		t.Errorf("output %q", got)
	}
	s.Exited()
	s.Close(context.Background())
}

func TestNothingLeftOpen(t *testing.T) {
	count := func() int {
		d, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(d)
	}
	before := count()
	for _, cfg := range []Config{{}, {Poll: true}, {Terminal: true}} {
		s, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		s.Abort()
		s.Abort()
	}
	if after := count(); after != before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}
