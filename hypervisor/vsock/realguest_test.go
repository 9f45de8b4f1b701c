// SPDX-License-Identifier: Apache-2.0

package vsock_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kata-v2/kata/hypervisor/vsock"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/guestsvc"
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
	early := make(chan error, 1)
	go func() { early <- echoOnce(u) }() // long before there is a driver
	earlyTool := dialHybrid(t, path, guestsvc.EchoPort)

	start := time.Now()
	vm := startGuest(t, u.QEMUFile())
	if err := <-early; err != nil {
		t.Fatalf("dial before the driver was up: %v; console:\n%s", err, vm.console())
	}
	t.Logf("dial made before QEMU ran, answered %v after its start", time.Since(start).Round(time.Millisecond))
	var port uint32
	if _, err := fmt.Fscanf(earlyTool, "OK %d\n", &port); err != nil {
		t.Fatalf("CONNECT before the driver was up: %v", err)
	}

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
	dial := func(port uint32) net.Conn {
		c, err := d.Dial(context.Background(), port)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(60 * time.Second))
		return c
	}
	const total = 128 << 20
	rate := func(name string, f func()) {
		cpu, start := cpuTime(), time.Now()
		f()
		took := time.Since(start)
		t.Logf("%s: %.0f MB/s, %v of this process's CPU per 100 MB", name, total/1e6/took.Seconds(),
			((cpuTime() - cpu) * 100e6 / total).Round(time.Millisecond))
	}
	for _, chunk := range []int{4 << 10, 36 << 10, 256 << 10} {
		rate(fmt.Sprintf("guest to host, writes of %d KiB", chunk>>10), func() {
			c := dial(guestsvc.SourcePort)
			defer c.Close()
			_ = binary.Write(c, binary.LittleEndian, guestsvc.SourceRequest{Total: total, Chunk: uint32(chunk), Seed: guestsvc.RawSeed})
			b := make([]byte, 256<<10)
			n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, c, b)
			if n != total || err != nil {
				t.Fatal(n, err)
			}
		})
		rate(fmt.Sprintf("host to guest, writes of %d KiB", chunk>>10), func() {
			c := dial(guestsvc.SinkPort)
			defer c.Close()
			_, _ = c.Write(make([]byte, 4))
			b := make([]byte, chunk)
			for n := 0; n < total; n += chunk {
				if _, err := c.Write(b); err != nil {
					t.Fatal(err)
				}
			}
			_ = c.(vsock.HalfCloser).CloseWrite()
			var r guestsvc.SinkReply
			if err := binary.Read(c, binary.LittleEndian, &r); err != nil {
				t.Fatal(err)
			}
		})
	}
	c := dial(guestsvc.EchoPort)
	defer c.Close()
	var b [1]byte
	t.Logf("round trip of 1 byte: %v", median(1000, func() {
		_, _ = c.Write(b[:])
		_, _ = io.ReadFull(c, b[:])
	}))
	t.Logf("dial and close: %v", median(300, func() { _ = dial(guestsvc.EchoPort).Close() }))
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

func median(n int, f func()) string {
	times := make([]time.Duration, n)
	for i := range times {
		start := time.Now()
		f()
		times[i] = time.Since(start)
	}
	slices.Sort(times)
	return fmt.Sprintf("median %v, p99 %v", times[n/2], times[n*99/100])
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
