// SPDX-License-Identifier: Apache-2.0

package vsock_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/kata-v2/kata/hypervisor/vsock"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/guestsvc"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/measure"
)

const timeout = 20 * time.Second

type logWriter struct{ t *testing.T }

func (w logWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", p)
	return len(p), nil
}

func logger(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(logWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// newDevice makes a device and a driver that has negotiated but runs no rings.
func newDevice(t *testing.T, conf vsock.UserConfig, dc vsocktest.DriverConfig) (*vsock.User, *vsocktest.Driver) {
	t.Helper()
	conf.Logger = logger(t)
	u, err := vsock.NewUser(conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = u.Close() })
	d, err := vsocktest.NewDriver(u.QEMUFile(), dc)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = d.Close()
		<-u.Done()
		d.Free()
	})
	return u, d
}

// boot starts a guest on d that serves the suite.
func boot(t *testing.T, d *vsocktest.Driver, split int) *vsocktest.Guest {
	t.Helper()
	g := vsocktest.NewGuest(d, vsock.DefaultGuestCID, split)
	t.Cleanup(g.Close)
	s, err := guestsvc.Start(guestsvc.Net{Listen: g.Listen, Dial: g.Dial})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	if err := g.Boot(); err != nil {
		t.Fatal(err)
	}
	return g
}

func TestUserConformance(t *testing.T) {
	bulk, streams := int64(8<<20), 1000
	if raceEnabled {
		bulk, streams = 1<<20, 200
	}
	for i, tt := range []struct {
		dc    vsocktest.DriverConfig
		split int
	}{
		{vsocktest.DriverConfig{}, 1},
		{vsocktest.DriverConfig{Features: vsocktest.FeatEventIdx}, 4},
		{vsocktest.DriverConfig{Features: vsocktest.FeatEventIdx, RingSize: 256}, 2},
		{vsocktest.DriverConfig{RingSize: 16}, 3},
	} {
		if raceEnabled && i%2 == 1 {
			continue
		}
		t.Run(fmt.Sprintf("features=%#x,ring=%d,split=%d", tt.dc.Features, tt.dc.RingSize, tt.split), func(t *testing.T) {
			t.Parallel()
			u, d := newDevice(t, vsock.UserConfig{}, tt.dc)
			boot(t, d, tt.split)
			vsocktest.Run(t, vsocktest.Config{Device: u, Bulk: bulk, Streams: streams, Timeout: timeout})
			if err := u.Err(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestMeasure(t *testing.T) {
	u, d := newDevice(t, vsock.UserConfig{}, vsocktest.DriverConfig{Features: vsocktest.FeatEventIdx})
	boot(t, d, 1)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	const total = 300_001 // not whole writes
	if rate, err := measure.Up(ctx, u, total, 4000); err != nil || rate <= 0 {
		t.Errorf("up: %v MB/s, %v", rate, err)
	}
	if rate, err := measure.Down(ctx, u, total, 4000); err != nil || rate <= 0 {
		t.Errorf("down: %v MB/s, %v", rate, err)
	}
	if times, err := measure.RoundTrips(ctx, u, 10); err != nil || len(times) != 10 {
		t.Errorf("round trips: %v, %v", times, err)
	}
	time.AfterFunc(10*time.Millisecond, cancel)
	if _, err := measure.Up(ctx, u, 1<<40, 4000); !errors.Is(err, context.Canceled) {
		t.Errorf("up with a context that ends: %v", err)
	}
}

func TestDialBeforeDriver(t *testing.T) {
	path := filepath.Join(t.TempDir(), "v.sock")
	u, d := newDevice(t, vsock.UserConfig{HybridPath: path}, vsocktest.DriverConfig{})
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
	defer cancel()
	if _, err := u.Dial(ctx, guestsvc.EchoPort); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("dial without a driver: %v", err)
	}
	const dials = 50
	early := make(chan error, dials)
	for range dials {
		go func() { early <- echoOnce(u) }()
	}
	tool := dialHybrid(t, path, guestsvc.EchoPort)
	select {
	case err := <-early:
		t.Fatalf("dial ended without a driver: %v", err)
	case <-time.After(50 * time.Millisecond): // the test of a wait
	}
	boot(t, d, 1)
	for range dials {
		if err := <-early; err != nil {
			t.Error(err)
		}
	}
	var port uint32
	if _, err := fmt.Fscanf(tool, "OK %d\n", &port); err != nil {
		t.Error(err)
	}
}

func TestMachineGoesAway(t *testing.T) {
	u, d := newDevice(t, vsock.UserConfig{}, vsocktest.DriverConfig{})
	l, err := u.Listen(0)
	if err != nil {
		t.Fatal(err)
	}
	dialled, accepted := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := u.Dial(context.Background(), guestsvc.EchoPort)
		dialled <- err
	}()
	go func() {
		_, err := l.Accept()
		accepted <- err
	}()
	d.Close()
	if err := <-dialled; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("dial when the machine went away: %v", err)
	}
	if err := <-accepted; !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept when the machine went away: %v", err)
	}
	<-u.Done()
	if _, err := u.Listen(0); err == nil {
		t.Error("listen on a device that has ended")
	}
	if err := u.Err(); err != nil {
		t.Errorf("an orderly end is no error: %v", err)
	}
}

func TestPauseAndReboot(t *testing.T) {
	u, d := newDevice(t, vsock.UserConfig{}, vsocktest.DriverConfig{Features: vsocktest.FeatEventIdx})
	g := boot(t, d, 1)
	c, err := u.Dial(context.Background(), guestsvc.EchoPort)
	if err != nil {
		t.Fatal(err)
	}
	echo := func() error {
		_ = c.SetDeadline(time.Now().Add(timeout))
		if _, err := c.Write([]byte("ping")); err != nil {
			return err
		}
		_, err := io.ReadFull(c, make([]byte, 4))
		return err
	}
	for i := range 5 {
		if err := echo(); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		for _, r := range d.Rings { // a paused machine
			if err := r.Stop(); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.Start(); err != nil { // also replaces the memory table
			t.Fatal(err)
		}
	}
	if err := d.SetMemTable(); err != nil { // under running rings, as for memory hot-plug
		t.Fatal(err)
	}
	if err := echo(); err != nil {
		t.Fatal(err)
	}
	for _, r := range d.Rings { // a rebooted one
		if err := r.Stop(); err != nil {
			t.Fatal(err)
		}
	}
	g.Halt()
	for _, r := range d.Rings {
		r.Reset()
	}
	boot(t, d, 1)
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("stream of a guest that has rebooted: %v", err)
	}
	if c, err = u.Dial(context.Background(), guestsvc.EchoPort); err != nil {
		t.Fatal(err)
	}
	if err := echo(); err != nil {
		t.Error(err)
	}
}

// A guest moves its interrupts between CPUs while data flows: none may be lost,
// since a driver that waits for one gets no other.
func TestMaskedInterrupts(t *testing.T) {
	u, d := newDevice(t, vsock.UserConfig{}, vsocktest.DriverConfig{Features: vsocktest.FeatEventIdx})
	boot(t, d, 1)
	c, err := u.Dial(context.Background(), guestsvc.EchoPort)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	stop, masked := make(chan struct{}), make(chan error)
	go func() {
		for {
			for _, r := range d.Rings[:2] {
				if err := errors.Join(r.Mask(), r.Unmask()); err != nil {
					masked <- err
					return
				}
			}
			select {
			case <-stop:
				masked <- nil
				return
			default:
			}
		}
	}()
	for i := range 5000 {
		_ = c.SetDeadline(time.Now().Add(timeout))
		_, err := c.Write([]byte("x"))
		if err == nil {
			_, err = io.ReadFull(c, make([]byte, 1))
		}
		if err != nil {
			t.Errorf("round trip %d: %v", i, err)
			break
		}
	}
	close(stop)
	if err := <-masked; err != nil {
		t.Error(err)
	}
}

func TestHybrid(t *testing.T) {
	path := filepath.Join(t.TempDir(), "v.sock")
	u, d := newDevice(t, vsock.UserConfig{HybridPath: path}, vsocktest.DriverConfig{})
	boot(t, d, 2)
	for _, hello := range []string{"CONNECT %d\n", "connect %d\nearly"} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(timeout))
		fmt.Fprintf(c, hello, guestsvc.EchoPort)
		var port uint32
		if _, err := fmt.Fscanf(c, "OK %d\n", &port); err != nil || port == 0 {
			t.Fatalf("answer: port %d, %v", port, err)
		}
		fmt.Fprint(c, " and late")
		if err := c.(*net.UnixConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(c)
		want := hello[len("CONNECT %d\n"):] + " and late"
		if err != nil || string(b) != want {
			t.Errorf("%q came back, want %q: %v", b, want, err)
		}
	}
	for _, hello := range []string{fmt.Sprintf("CONNECT %d\n", guestsvc.ClosedPort), "CONNECT x\n", "HELO 5\n", string(make([]byte, 100))} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(timeout))
		fmt.Fprint(c, hello)
		if b, err := io.ReadAll(c); len(b) != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%q: answer %q, %v", hello, b, err)
		}
		c.Close()
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	u.Close()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}
