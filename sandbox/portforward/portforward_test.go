// SPDX-License-Identifier: Apache-2.0

package portforward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/internal/spawn"
	"github.com/kata-v2/kata/protocols"
	"github.com/vishvananda/netlink"
)

// helperVar makes this program one that only opens the namespace that it names.
const helperVar = "PORTFORWARD_TEST_NAMESPACE"

func TestMain(m *testing.M) {
	if path := os.Getenv(helperVar); path != "" {
		if _, err := Open(path, Options{}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println("open")
		io.Copy(io.Discard, os.Stdin) // until it is killed, or its parent is
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// namespace is a network namespace with loopback, and a thread in it.
func namespace(t *testing.T) (*spawn.Thread, string) {
	t.Helper()
	thread := spawn.NewThread()
	t.Cleanup(thread.Close)
	if err := thread.EnterNetNS(""); err != nil {
		t.Fatal(err)
	}
	var tid int
	err := thread.Do(func() error {
		tid = unix.Gettid()
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	if err != nil {
		t.Fatal(err)
	}
	return thread, fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), tid)
}

// dial connects inside of the thread's namespace.
func dial(t *testing.T, thread *spawn.Thread, address string) (*net.TCPConn, error) {
	t.Helper()
	var c net.Conn
	err := thread.Do(func() (err error) {
		c, err = (&net.Dialer{FallbackDelay: -1}).Dial("tcp", address)
		return err
	})
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn), nil
}

// guest stands for the agent: it answers status and then echoes, with the port, what it gets.
type guest struct {
	t      *testing.T
	status byte
	gone   bool
}

func (g *guest) dial(_ context.Context, port uint32) (net.Conn, error) {
	if g.gone || port != protocols.ForwardPort {
		return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "guest")
		if ends[i], err = net.FileConn(f); err != nil {
			return nil, err
		}
		f.Close()
	}
	go g.serve(ends[1])
	return ends[0], nil
}

func (g *guest) serve(c net.Conn) {
	defer c.Close()
	header := make([]byte, protocols.ForwardHeaderSize)
	if _, err := io.ReadFull(c, header); err != nil {
		g.t.Error(err)
	}
	port, err := protocols.ParseForwardHeader(header)
	if err != nil {
		g.t.Error(err)
	}
	c.Write([]byte{g.status})
	if g.status == 0 {
		b, _ := io.ReadAll(c)
		fmt.Fprintf(c, "%d %s", port, b)
	}
}

// serve forwards the namespace's ports to g until the test's end, or stop.
func serve(t *testing.T, path string, g *guest, log io.Writer) (stop func()) {
	t.Helper()
	f, err := Open(path, Options{Dial: g.dial, Log: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); f.Serve(ctx) }()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return stop
}

func TestForward(t *testing.T) {
	thread, path := namespace(t)
	stop := serve(t, path, &guest{t: t}, io.Discard)
	for address, want := range map[string]string{
		"127.0.0.1:8080": "8080 hello", "127.0.0.1:1": "1 hello", "127.9.9.9:65535": "65535 hello", "[::1]:443": "443 hello",
	} {
		c, err := dial(t, thread, address)
		if err != nil {
			t.Errorf("%s: %v", address, err)
			continue
		}
		c.Write([]byte("hello"))
		c.CloseWrite()
		if got, err := io.ReadAll(c); string(got) != want || err != nil {
			t.Errorf("%s: %q, %v; want %q", address, got, err, want)
		}
	}
	open, err := dial(t, thread, "127.0.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	stop()
	if _, err := open.Read(make([]byte, 1)); err == nil {
		t.Error("a connection outlives the end")
	}
	if _, err := dial(t, thread, "127.0.0.1:80"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("after the end: %v", err)
	}
}

// TestOnlyLoopback: the namespace's other addresses are left alone, and so is the
// loopback of every other namespace.
func TestOnlyLoopback(t *testing.T) {
	thread, path := namespace(t)
	other, _ := namespace(t)
	serve(t, path, &guest{t: t}, io.Discard)
	err := thread.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		addr, err := netlink.ParseAddr("192.0.2.9/32")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(lo, addr)
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dial(t, thread, "192.0.2.9:80"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("another address: %v", err)
	}
	if _, err := dial(t, other, "127.0.0.1:80"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("another namespace: %v", err)
	}
}

// TestWithoutIPv6: a namespace without ::1 has IPv4.
func TestWithoutIPv6(t *testing.T) {
	thread, path := namespace(t)
	err := thread.Do(func() error {
		return os.WriteFile("/proc/thread-self/sys/net/ipv6/conf/lo/disable_ipv6", []byte("1"), 0)
	})
	if err != nil {
		err = thread.Do(func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			addr, err := netlink.ParseAddr("::1/128")
			if err != nil {
				return err
			}
			return netlink.AddrDel(lo, addr)
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	serve(t, path, &guest{t: t}, io.Discard)
	if _, err := dial(t, thread, "127.0.0.1:80"); err != nil {
		t.Error(err)
	}
}

// TestRefusals: the client's connection is reset, and the log says why.
func TestRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		guest guest
		want  string
	}{
		"Closed":   {guest{t: t, status: byte(syscall.ECONNREFUSED)}, "connect to the port in the guest: connection refused"},
		"Upstream": {guest{t: t, gone: true}, "tcp-forward"},
	} {
		t.Run(name, func(t *testing.T) {
			thread, path := namespace(t)
			var log strings.Builder
			stop := serve(t, path, &c.guest, &log)
			conn, err := dial(t, thread, "127.0.0.1:80")
			if err == nil { // else the reset was quick
				_, err = conn.Read(make([]byte, 1))
			}
			if !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("got %v; want a reset", err)
			}
			stop()
			if !strings.Contains(log.String(), c.want) || !strings.Contains(log.String(), "port=80") {
				t.Errorf("log %q; want %q", log.String(), c.want)
			}
		})
	}
}

func TestOpenFails(t *testing.T) {
	if _, err := Open(filepath.Join(t.TempDir(), "none"), Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

// TestKilled: a process that is killed leaves the namespace as it was.
func TestKilled(t *testing.T) {
	thread, path := namespace(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), helperVar+"="+path)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("open\n"))); err != nil {
		t.Error(err)
	}
	if _, err := dial(t, thread, "127.0.0.1:80"); err != nil { // it queues
		t.Error(err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	for _, address := range []string{"127.0.0.1:80", "[::1]:80"} {
		if _, err := dial(t, thread, address); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: %v; want a refusal", address, err)
		}
	}
}

// TestMany: one more than the most is reset, and the others go on.
func TestMany(t *testing.T) {
	thread, path := namespace(t)
	serve(t, path, &guest{t: t}, io.Discard)
	ask := func() *net.TCPConn {
		t.Helper()
		c, err := dial(t, thread, "127.0.0.1:80")
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	first := ask()
	for range protocols.MaxForwards - 1 {
		ask()
	}
	c, err := dial(t, thread, "127.0.0.1:80")
	if err == nil { // else the reset was quick
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("one too many: %v; want a reset", err)
	}
	first.CloseWrite()
	if got, err := io.ReadAll(first); string(got) != "80 " || err != nil {
		t.Errorf("the first: %q, %v", got, err)
	}
}
