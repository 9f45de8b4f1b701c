// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

type testAddr struct {
	peer bool
	port uint32
}

func (testAddr) Network() string  { return "test" }
func (a testAddr) String() string { return fmt.Sprint(a.peer, a.port) }

func addr(peer bool, port uint32) net.Addr { return testAddr{peer, port} }

// pair is a channel with both ends attached; they end with the test.
func pair(t *testing.T) (host, guest *Mux) {
	t.Helper()
	a, b := net.Pipe()
	host, guest = New(Config{Host: true, Addr: addr}), New(Config{Addr: addr})
	must(t, host.Attach(a))
	must(t, guest.Attach(b))
	t.Cleanup(func() { host.Close(); guest.Close() })
	return host, guest
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// connect is a stream from a to b.
func connect(t *testing.T, a, b *Mux, port uint32) (net.Conn, net.Conn) {
	t.Helper()
	l, err := b.Listen(port)
	must(t, err)
	defer l.Close()
	dialled := make(chan net.Conn, 1)
	go func() {
		c, err := a.Dial(context.Background(), port)
		if err != nil {
			t.Error(err)
		}
		dialled <- c
	}()
	c, err := l.Accept()
	must(t, err)
	d := <-dialled
	if d.LocalAddr().(testAddr).port != c.RemoteAddr().(testAddr).port || d.RemoteAddr().(testAddr).port != port {
		t.Errorf("%v to %v is %v to %v at the other end", d.LocalAddr(), d.RemoteAddr(), c.RemoteAddr(), c.LocalAddr())
	}
	return d, c
}

func TestStreamsBothWays(t *testing.T) {
	host, guest := pair(t)
	for _, p := range [][2]*Mux{{host, guest}, {guest, host}} {
		c, d := connect(t, p[0], p[1], 7)
		sent := bytes.Repeat([]byte("0123456789abcdef"), 200_000) // more than a window
		go func() { _, _ = c.Write(sent); _ = c.(*Conn).CloseWrite() }()
		got, err := io.ReadAll(d)
		must(t, err)
		if !bytes.Equal(got, sent) {
			t.Fatalf("%d bytes of %d arrived, or others", len(got), len(sent))
		}
		_, err = d.Write([]byte("answer")) // the other direction is open
		must(t, err)
		must(t, d.Close())
		if got, err := io.ReadAll(c); err != nil || string(got) != "answer" {
			t.Fatalf("answer is %q, %v", got, err)
		}
		must(t, c.Close())
	}
}

func TestRefused(t *testing.T) {
	host, guest := pair(t)
	_, err := host.Dial(context.Background(), 9)
	if !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dial of a port nobody listens on: %v", err)
	}
	l, err := guest.Listen(9)
	must(t, err)
	if _, err := guest.Listen(9); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("second listener: %v", err)
	}
	for range backlog {
		_, err := host.Dial(context.Background(), 9)
		must(t, err)
	}
	if _, err := host.Dial(context.Background(), 9); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("one more than the backlog: %v", err)
	}
	must(t, l.Close())
	if _, err := host.Dial(context.Background(), 9); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dial of a port that was closed: %v", err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept of a closed listener: %v", err)
	}
}

// A writer learns that nobody reads any more, and a reader that waits wakes.
func TestCloseEndsWriterAndReader(t *testing.T) {
	host, guest := pair(t)
	c, d := connect(t, host, guest, 5)
	read := make(chan error, 1)
	go func() { _, err := c.Read(make([]byte, 1)); read <- err }()
	must(t, c.Close())
	if err := <-read; !errors.Is(err, net.ErrClosed) {
		t.Errorf("read of a closed stream: %v", err)
	}
	var err error
	for err == nil { // a few bytes are under way before the reset arrives
		_, err = d.Write(make([]byte, 64<<10))
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("write to a closed stream: %v", err)
	}
	if err := c.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second close: %v", err)
	}
}

func TestDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		host, guest := New(Config{Host: true, Addr: addr}), New(Config{Addr: addr})
		must(t, host.Attach(a))
		must(t, guest.Attach(b))
		defer host.Close()
		defer guest.Close()
		c, _ := connect(t, host, guest, 5)
		must(t, c.SetReadDeadline(time.Now().Add(time.Second)))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read: %v", err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if _, err := New(Config{Addr: addr}).Dial(ctx, 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("dial of an end that is not attached: %v", err)
		}
	})
}

// Everything ends with the connection, and so does what waits for it.
func TestEnd(t *testing.T) {
	host, guest := pair(t)
	c, _ := connect(t, host, guest, 5)
	l, err := host.Listen(0)
	must(t, err)
	errs := make(chan error, 2)
	go func() { _, err := c.Read(make([]byte, 1)); errs <- err }()
	go func() { _, err := l.Accept(); errs <- err }()
	must(t, guest.Close())
	for range 2 {
		if err := <-errs; err == nil {
			t.Error("no error although the other end has gone")
		}
	}
	<-host.Done()
	if _, err := host.Dial(context.Background(), 5); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("dial: %v", err)
	}
	b, _ := net.Pipe()
	if err := host.Attach(b); err == nil {
		t.Error("attached twice")
	}
}

func TestOpening(t *testing.T) {
	a, b := net.Pipe()
	want := NewHello(true, true)
	var got Hello
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := Greet(b, func(h Hello) error { got = h; return nil }); err != nil {
			t.Error(err)
		}
	})
	must(t, ReadGreeting(a))
	must(t, SendHello(a, want))
	must(t, ReadAck(a))
	wg.Wait()
	if !got.Restored || !got.Scan || got.Entropy != want.Entropy || got.Time.UnixNano() != want.Time.UnixNano() {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if NewHello(true, true).Entropy == want.Entropy {
		t.Error("two Hellos have the same entropy")
	}
}

func TestOpeningRefused(t *testing.T) {
	a, b := net.Pipe()
	go func() { _, _ = b.Write([]byte("GET / HTTP/1.1\r\n")) }()
	if err := ReadGreeting(a); err == nil {
		t.Error("a wrong greeting was taken")
	}
	if _, err := decodeHello(make([]byte, HelloSize)); err == nil {
		t.Error("a wrong hello was taken")
	}
	b.Close()
	if err := ReadAck(a); err == nil {
		t.Error("no error at the end of the connection")
	}
}

// A guest that speaks nonsense ends its channel, not the host.
func FuzzHost(f *testing.F) {
	f.Add([]byte{0, 1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 8, 9, 0, 0, 0, 1, 0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		a, b := net.Pipe()
		m := New(Config{Host: true, Addr: addr})
		if _, err := m.Listen(9); err != nil {
			t.Fatal(err)
		}
		if err := m.Attach(a); err != nil {
			t.Fatal(err)
		}
		go io.Copy(io.Discard, b) //nolint:errcheck // ends with b
		_ = b.SetWriteDeadline(time.Now().Add(time.Second))
		_, _ = b.Write(data)
		b.Close()
		<-m.Done()
		m.Close()
	})
}
