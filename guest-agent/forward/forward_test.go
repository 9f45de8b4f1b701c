// SPDX-License-Identifier: Apache-2.0

package forward

import (
	"context"
	"io"
	"log/slog"
	"net"
	"syscall"
	"testing"

	"github.com/kata-v2/kata/protocols"
)

// listen is a TCP listener that ends with the test, and its port.
func listen(t *testing.T, address string) (net.Listener, uint16) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, uint16(l.Addr().(*net.TCPAddr).Port)
}

// start serves; TCP stands for vsock. The returned function is a host that asks.
func start(t *testing.T) func(header []byte) *net.TCPConn {
	t.Helper()
	l, _ := listen(t, "127.0.0.1:0")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); Serve(ctx, l, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() { cancel(); <-done })
	return func(header []byte) *net.TCPConn {
		t.Helper()
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if _, err := c.Write(header); err != nil {
			t.Fatal(err)
		}
		return c.(*net.TCPConn)
	}
}

// status reads the one byte of the answer.
func status(t *testing.T, c net.Conn) syscall.Errno {
	t.Helper()
	var b [1]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		t.Fatal(err)
	}
	return syscall.Errno(b[0])
}

// echo answers each connection with what it got, once that has ended.
func echo(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		b, _ := io.ReadAll(c)
		c.Write(append([]byte("echo "), b...))
		c.Close()
	}
}

func TestForward(t *testing.T) {
	ask := start(t)
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, port := listen(t, address)
		go echo(l)
		c := ask(protocols.ForwardHeader(port))
		if s := status(t, c); s != 0 {
			t.Fatalf("%s: %v", address, s)
		}
		c.Write([]byte("hello"))
		c.CloseWrite()
		if got, err := io.ReadAll(c); string(got) != "echo hello" || err != nil {
			t.Errorf("%s: %q, %v", address, got, err)
		}
	}
}

func TestRefusals(t *testing.T) {
	ask := start(t)
	l, port := listen(t, "127.0.0.1:0")
	l.Close()
	if s := status(t, ask(protocols.ForwardHeader(port))); s != syscall.ECONNREFUSED {
		t.Errorf("nobody listens: %v", s)
	}
	c := ask([]byte("GET / "))
	if s := status(t, c); s != syscall.EPROTO {
		t.Errorf("not a header: %v", s)
	}
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after a refusal: %v", err)
	}
}

// TestMany: one more than the most is turned away, and the others go on.
func TestMany(t *testing.T) {
	ask := start(t)
	l, port := listen(t, "127.0.0.1:0")
	var conns []*net.TCPConn
	for range protocols.MaxForwards {
		c := ask(protocols.ForwardHeader(port)) // the kernel's backlog holds them
		if s := status(t, c); s != 0 {
			t.Fatal(s)
		}
		conns = append(conns, c)
	}
	if s := status(t, ask(protocols.ForwardHeader(port))); s != syscall.EAGAIN {
		t.Errorf("one too many: %v", s)
	}
	for _, c := range conns {
		c.CloseWrite()
	}
	go echo(l)
	if _, err := io.ReadAll(conns[0]); err != nil {
		t.Error(err)
	}
}
