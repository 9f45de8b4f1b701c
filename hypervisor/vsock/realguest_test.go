// SPDX-License-Identifier: Apache-2.0

package vsock_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kata-v2/kata/hypervisor/hypervisortest/guestimage"
	"github.com/kata-v2/kata/hypervisor/vsock"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/guestsvc"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/measure"
)

// TestRealGuest runs the suite against a Linux guest in QEMU.
func TestRealGuest(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a machine")
	}
	path := filepath.Join(t.TempDir(), "v.sock")
	u, err := vsock.NewUser(vsock.UserConfig{HybridPath: path, Logger: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	ready, err := u.Listen(readyPort)
	if err != nil {
		t.Fatal(err)
	}
	builtIn := guestimage.BuiltIn(t)
	early := make(chan error, 1)
	go func() { early <- echoOnce(u) }() // long before there is a driver
	earlyTool := dialHybrid(t, path, guestsvc.EchoPort)

	start := time.Now()
	vm := startGuest(t, u.QEMUFile(), 1)
	// A driver that is built into the kernel is up before anybody in the guest listens: it may refuse.
	if err := <-early; err != nil && !(builtIn && errors.Is(err, syscall.ECONNREFUSED)) {
		t.Fatalf("dial before the driver was up: %v; console:\n%s", err, vm.console())
	}
	t.Logf("dial made before QEMU ran, answered %v after its start", time.Since(start).Round(time.Millisecond))
	var port uint32
	if _, err := fmt.Fscanf(earlyTool, "OK %d\n", &port); err != nil && (!builtIn || errors.Is(err, os.ErrDeadlineExceeded)) {
		t.Fatalf("CONNECT before the driver was up: %v", err)
	}
	vm.awaitReady(t, ready)
	t.Logf("guest ready %v after QEMU's start", time.Since(start).Round(time.Millisecond))

	vsocktest.Run(t, vsocktest.Config{Device: u, Bulk: 8 << 20, Streams: 1000, Timeout: 60 * time.Second})
	t.Run("KilledTools", func(t *testing.T) { killedTools(t, u, path) })
	t.Run("Figures", func(t *testing.T) { figures(t, u) })
	t.Run("Idle", func(t *testing.T) { idle(t) })
	if t.Failed() {
		t.Logf("console:\n%s", vm.console())
	}
	vm.kill()
	select {
	case <-u.Done():
	case <-time.After(5 * time.Second):
		t.Error("the device has not noticed QEMU's end")
	}
	if err := u.Err(); err != nil {
		t.Errorf("device: %v", err)
	}
}

// TestMovedInterrupts runs a guest of two CPUs that moves its interrupts between
// them while streams are used.
func TestMovedInterrupts(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a machine")
	}
	u, err := vsock.NewUser(vsock.UserConfig{Logger: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	ready, err := u.Listen(readyPort)
	if err != nil {
		t.Fatal(err)
	}
	vm := startGuest(t, u.QEMUFile(), 2, guestsvc.MoveParam)
	vm.awaitReady(t, ready)
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	if times, err := measure.RoundTrips(ctx, u, 600); err != nil {
		t.Errorf("after %d round trips: %v; console:\n%s", len(times), err, vm.console())
	}
	if !strings.Contains(vm.console(), "guestinit: moves ") {
		t.Errorf("no interrupts were moved; console:\n%s", vm.console())
	}
}

// readyPort is the host's port that the guest dials when it listens.
const readyPort = 2000

func echoOnce(d vsock.Device) error {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	c, err := d.Dial(ctx, guestsvc.EchoPort)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err = io.ReadFull(c, make([]byte, 1))
	return err
}

func dialHybrid(t *testing.T, path string, port uint32) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(60 * time.Second))
	if _, err := fmt.Fprintf(c, "CONNECT %d\n", port); err != nil {
		t.Fatal(err)
	}
	return c
}

// killedTools closes clients of the hybrid socket abruptly while data flows both ways.
func killedTools(t *testing.T, d vsock.Device, path string) {
	for range 20 {
		c := dialHybrid(t, path, guestsvc.SourcePort)
		var port uint32
		if _, err := fmt.Fscanf(c, "OK %d\n", &port); err != nil {
			t.Fatal(err)
		}
		r := guestsvc.SourceRequest{Total: 1 << 30, Chunk: 36 << 10, Seed: 1}
		if err := binary.Write(c, binary.LittleEndian, r); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 100_000)); err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
		if err := echoOnce(d); err != nil {
			t.Fatal(err)
		}
	}
}

// figures prints throughput, latency and connection times; they are no verdict.
func figures(t *testing.T, d vsock.Device) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	const total = 128 << 20
	for _, write := range []int{4 << 10, 36 << 10, 64 << 10, 256 << 10} {
		for name, f := range map[string]func(context.Context, measure.Dialer, int64, int) (float64, error){"up": measure.Up, "down": measure.Down} {
			cpu := cpuTime()
			rate, err := f(ctx, d, total, write)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%s, writes of %d KiB: %.0f MB/s, %v of this process's CPU per 100 MB", name, write>>10, rate,
				((cpuTime() - cpu) * 100e6 / total).Round(time.Millisecond))
		}
	}
	times, err := measure.RoundTrips(ctx, d, 1000)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("round trip of 1 byte: %v", spread(times))
	times = times[:0]
	for range 300 {
		start := time.Now()
		c, err := d.Dial(ctx, guestsvc.EchoPort)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
		times = append(times, time.Since(start))
	}
	t.Logf("dial and close: %v", spread(times))
}

// idle checks that a device with a quiet guest takes no CPU.
func idle(t *testing.T) {
	const span = 3 * time.Second
	runtime.GC()
	before := cpuTime()
	time.Sleep(span) // the measurement
	used := cpuTime() - before
	t.Logf("idle: %v of CPU in %v", used, span)
	if used > span/100 {
		t.Errorf("idle device used %v of CPU in %v", used, span)
	}
}

func cpuTime() time.Duration {
	var r syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &r)
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

func spread(times []time.Duration) string {
	slices.Sort(times)
	return fmt.Sprintf("median %v, p99 %v", times[len(times)/2], times[len(times)*99/100])
}

// lockedBuffer collects a console.
type lockedBuffer struct {
	mu sync.Mutex
	b  []byte
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b = append(l.b, p...)
	return len(p), nil
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.b)
}
