// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"testing"

	"github.com/kata-v2/kata/internal/channel"
)

// serialGuest is the other end of a Serial: its listener for echoes is open when the host is obeyed.
func serialGuest(t *testing.T, d *Serial, restored bool) {
	t.Helper()
	c, err := net.FileConn(d.QEMUFile())
	if err != nil {
		t.Fatal(err)
	}
	_ = d.QEMUFile().Close() // as after QEMU's start
	m := channel.New(channel.Config{Addr: func(_ bool, port uint32) net.Addr { return Addr{Port: port} }})
	l, err := m.Listen(7)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { m.Close(); <-done })
	go func() {
		defer close(done)
		var rw io.ReadWriter = c
		if restored { // it greeted another host, before it was saved
			rw = struct {
				io.Reader
				io.Writer
			}{c, &skip{c, 8}}
		}
		if err := channel.Greet(rw, func(h channel.Hello) error {
			if h.Restored != restored {
				return fmt.Errorf("hello says restored: %v", h.Restored)
			}
			return nil
		}); err != nil {
			c.Close()
			return
		}
		if err := m.Attach(c); err != nil {
			return
		}
		for {
			s, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.Copy(s, s)
			s.Close()
		}
	}()
}

// skip drops the first n bytes.
type skip struct {
	w io.Writer
	n int
}

func (s *skip) Write(b []byte) (int, error) {
	drop := min(s.n, len(b))
	s.n -= drop
	if drop == len(b) {
		return len(b), nil
	}
	n, err := s.w.Write(b[drop:])
	return drop + n, err
}

func TestSerial(t *testing.T) {
	for _, restored := range []bool{false, true} {
		t.Run(fmt.Sprintf("restored=%v", restored), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "vsock.sock")
			d, err := NewSerial(SerialConfig{Restored: restored, HybridPath: path})
			if err != nil {
				t.Fatal(err)
			}
			serialGuest(t, d, restored)
			<-d.Ready()
			c, err := d.Dial(context.Background(), 7)
			if err != nil {
				t.Fatal(err)
			}
			if a, ok := c.LocalAddr().(Addr); !ok || a.CID != HostCID || a.Port == 0 {
				t.Errorf("local address %v: want a vsock.Addr of the host", c.LocalAddr())
			}
			echo(t, c, c)
			echoHybrid(t, path)
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			<-d.Done()
			if _, err := c.Read(make([]byte, 1)); err == nil {
				t.Error("read after Close: no error")
			}
			if _, err := net.Dial("unix", path); err == nil {
				t.Error("the hybrid socket is there after Close")
			}
		})
	}
}

func echo(t *testing.T, w io.Writer, r io.Reader) {
	t.Helper()
	if _, err := io.WriteString(w, "hello"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 5)
	if _, err := io.ReadFull(r, b); err != nil || string(b) != "hello" {
		t.Fatalf("echo %q, %v", b, err)
	}
	if err := w.(HalfCloser).CloseWrite(); err != nil {
		t.Error(err)
	}
	if _, err := r.Read(b); !errors.Is(err, io.EOF) {
		t.Errorf("after the end of an echo: %v", err)
	}
}

// echoHybrid speaks to the guest as a tool of root's does.
func echoHybrid(t *testing.T, path string) {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "CONNECT 7\n")
	r := bufio.NewReader(c)
	if line, err := r.ReadString('\n'); err != nil || line[:3] != "OK " {
		t.Fatalf("answer %q, %v", line, err)
	}
	echo(t, c.(*net.UnixConn), r)
}

// A guest that does not answer as it should ends the device, with the reason.
func TestSerialWrongGuest(t *testing.T) {
	d, err := NewSerial(SerialConfig{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	q, err := net.FileConn(d.QEMUFile())
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	if _, err := io.WriteString(q, "SSH-2.0-"); err != nil {
		t.Fatal(err)
	}
	<-d.Done()
	if _, err := d.Dial(context.Background(), 7); err == nil {
		t.Error("dial: no error")
	}
}
