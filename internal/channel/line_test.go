// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// lines are two ends of a stream of bytes, greeted.
func lines(t *testing.T) (host, guest *Mux, hl, gl *Line) {
	t.Helper()
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	host, guest = New(Config{Host: true, Addr: addrOf}), New(Config{Addr: addrOf})
	hl, gl = NewLine(fileConn(t, p[0])), NewLine(fileConn(t, p[1]))
	t.Cleanup(func() { host.Close(); guest.Close(); hl.Close(); gl.Close() })
	return host, guest, hl, gl
}

func fileConn(t *testing.T, fd int) net.Conn {
	t.Helper()
	f := os.NewFile(uintptr(fd), "line")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

type lineAddr uint32

func (lineAddr) Network() string { return "test" }
func (lineAddr) String() string  { return "test" }

func addrOf(_ bool, port uint32) net.Addr { return lineAddr(port) }

func TestSessionsFollowEachOther(t *testing.T) {
	host, guest, hl, gl := lines(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	l, err := guest.Listen(7)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { // the guest
		for range 3 {
			if err := Greet(gl, func(Hello) error { return nil }); err != nil {
				served <- err
				return
			}
			if err := guest.Attach(gl); err != nil {
				served <- err
				return
			}
			<-guest.Detached()
		}
		served <- nil
	}()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); c.Close() }()
		}
	}()
	for round := range 3 {
		if err := errors.Join(ReadGreeting(hl), SendHello(hl, NewHello(true, false)), ReadAck(hl), host.Attach(hl)); err != nil {
			t.Fatal(round, err)
		}
		c, err := host.Dial(ctx, 7)
		if err != nil {
			t.Fatal(round, err)
		}
		sent := bytes.Repeat([]byte("Kata"), 100000)
		go func() { _, _ = c.Write(sent) }()
		got := make([]byte, len(sent))
		if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, sent) {
			t.Fatal(round, err)
		}
		if err := host.Detach(ctx); err != nil {
			t.Fatal(round, err)
		}
		if _, err := c.Read(got); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("a stream of a session that has ended: %v", err)
		}
		short, stop := context.WithCancel(ctx)
		stop()
		if _, err := host.Dial(short, 7); !errors.Is(err, context.Canceled) {
			t.Errorf("a dial between sessions: %v", err)
		}
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// A guest cannot end a session: that ends the channel.
func TestGuestEndsSession(t *testing.T) {
	host, _, hl, gl := lines(t)
	if err := host.Attach(hl); err != nil {
		t.Fatal(err)
	}
	if _, err := gl.Conn.Write(endMark); err != nil {
		t.Fatal(err)
	}
	<-host.Done()
	if err := host.Err(); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("ended with %v", err)
	}
}

// A mark is found wherever the reads are cut, and never within a frame.
func TestScan(t *testing.T) {
	frame := func(kind byte, n uint32, body string) []byte {
		b := []byte{0, kind, 0, 0, 0, 0, 0, 1}
		return append(binary.BigEndian.AppendUint32(b, n), body...)
	}
	own := append(frame(0, 12, string(endMark)), frame(1, 12, "")...)
	all := append(append(bytes.Clone(own), endMark...), "KATAGST1"...)
	for cut := 1; cut < len(all); cut++ {
		s := newSession(&Line{}, false)
		var got []byte
		for _, b := range [][]byte{all[:cut], all[cut:]} {
			if !s.eof {
				got = append(got, b[:s.scan(b)]...)
			} else {
				s.rest = append(s.rest, b...)
			}
		}
		if !s.ended() || !bytes.Equal(got, own) || string(s.rest) != "KATAGST1" {
			t.Fatalf("cut at %d: ended %t, %q, rest %q", cut, s.ended(), got, s.rest)
		}
	}
}
