// SPDX-License-Identifier: Apache-2.0

package vsock_test

import (
	"context"
	"encoding/binary"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/hypervisor/vsock"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest"
)

// Flags of descriptors.
const (
	next     = 1
	write    = 2
	indirect = 4
)

const (
	low = 0x1000_0000 // where the driver's memory is
	far = 0xdead_0000_0000
)

// ends waits for the device to end by itself and checks the reason.
func ends(t *testing.T, u *vsock.User, want string) {
	t.Helper()
	select {
	case <-u.Done():
	case <-time.After(5 * time.Second):
		t.Fatal("the device goes on")
	}
	if err := u.Err(); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("device ended with %v; want %q in it", err, want)
	}
}

// packetAt writes a packet header that claims length bytes of payload.
func packetAt(d *vsocktest.Driver, at uint64, length uint32) {
	b := d.Mem(at, 44)
	clear(b)
	binary.LittleEndian.PutUint64(b, vsock.DefaultGuestCID)
	binary.LittleEndian.PutUint64(b[8:], vsock.HostCID)
	binary.LittleEndian.PutUint32(b[24:], length)
	b[28], b[30] = 1, 5
}

func TestHostileRings(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		ring       int
		do         func(d *vsocktest.Driver, r *vsocktest.Ring)
	}{
		{"index far ahead", "available index", 1, func(_ *vsocktest.Driver, r *vsocktest.Ring) { r.SetAvailIdx(r.Num + 1) }},
		{"index behind", "available index", 1, func(_ *vsocktest.Driver, r *vsocktest.Ring) { r.SetAvailIdx(0xffff) }},
		{"head outside", "descriptor 128", 1, func(_ *vsocktest.Driver, r *vsocktest.Ring) { r.Offer(r.Num) }},
		{"next outside", "descriptor 60000", 1, func(_ *vsocktest.Driver, r *vsocktest.Ring) {
			r.SetDesc(0, low, 44, next, 60000)
			r.Offer(0)
		}},
		{"loop", "a loop", 1, func(_ *vsocktest.Driver, r *vsocktest.Ring) {
			r.SetDesc(0, low, 1, next, 1)
			r.SetDesc(1, low, 1, next, 0)
			r.Offer(0)
		}},
		{"self loop of the whole memory", "a loop", 1, func(_ *vsocktest.Driver, r *vsocktest.Ring) {
			r.SetDesc(0, low, 8<<20, next, 0)
			r.Offer(0)
		}},
		{"indirect table", "not offered", 1, func(d *vsocktest.Driver, r *vsocktest.Ring) {
			vsocktest.PutDesc(d.Mem(low, 16), low, 44, 0, 0)
			r.SetDesc(0, low, 16, indirect, 0)
			r.Offer(0)
		}},
		{"indirect table after a buffer", "not offered", 0, func(_ *vsocktest.Driver, r *vsocktest.Ring) {
			r.SetDesc(0, low, 4096, write|next, 1)
			r.SetDesc(1, low, 16, write|indirect, 0)
			r.Offer(0)
		}},
		{"address outside", "outside of its memory", 1, func(_ *vsocktest.Driver, r *vsocktest.Ring) {
			r.SetDesc(0, far, 44, 0, 0)
			r.Offer(0)
		}},
		{"huge length", "outside of its memory", 1, func(_ *vsocktest.Driver, r *vsocktest.Ring) {
			r.SetDesc(0, low, 0xffff_ffff, 0, 0)
			r.Offer(0)
		}},
		{"length wraps", "wraps", 1, func(_ *vsocktest.Driver, r *vsocktest.Ring) {
			r.SetDesc(0, 0xffff_ffff_ffff_fff0, 0x20, 0, 0)
			r.Offer(0)
		}},
		{"short header", "no header", 1, func(_ *vsocktest.Driver, r *vsocktest.Ring) {
			r.SetDesc(0, low, 43, 0, 0)
			r.Offer(0)
		}},
		{"descriptors of length zero", "no header", 1, func(_ *vsocktest.Driver, r *vsocktest.Ring) {
			r.SetDesc(0, low, 0, next, 1)
			r.SetDesc(1, far, 0, 0, 0)
			r.Offer(0)
		}},
		{"buffer runs out of its region", "outside of its memory", 1, func(_ *vsocktest.Driver, r *vsocktest.Ring) {
			r.SetDesc(0, low+8<<20-20, 44, 0, 0)
			r.Offer(0)
		}},
		{"both directions in one chain", "one direction", 1, func(_ *vsocktest.Driver, r *vsocktest.Ring) {
			r.SetDesc(0, low, 44, next, 1)
			r.SetDesc(1, low, 44, write, 0)
			r.Offer(0)
		}},
		{"payload beyond the chain", "claims a payload", 1, func(d *vsocktest.Driver, r *vsocktest.Ring) {
			packetAt(d, low, 101)
			r.SetDesc(0, low, 44+100, 0, 0)
			r.Offer(0)
		}},
		{"huge payload", "claims a payload", 1, func(d *vsocktest.Driver, r *vsocktest.Ring) {
			packetAt(d, low, 0xffff_ffff)
			r.SetDesc(0, low, 4096, 0, 0)
			r.Offer(0)
		}},
		{"sends a buffer to write to", "one direction", 1, func(_ *vsocktest.Driver, r *vsocktest.Ring) {
			r.SetDesc(0, low, 44, write, 0)
			r.Offer(0)
		}},
		{"receives into a buffer to read", "one direction", 0, func(_ *vsocktest.Driver, r *vsocktest.Ring) {
			r.SetDesc(0, low, 4096, 0, 0)
			r.Offer(0)
		}},
		{"receive buffer without room", "receive buffer", 0, func(_ *vsocktest.Driver, r *vsocktest.Ring) {
			r.SetDesc(0, low, 44, write, 0)
			r.Offer(0)
		}},
		{"receive buffer outside", "outside of its memory", 0, func(_ *vsocktest.Driver, r *vsocktest.Ring) {
			r.SetDesc(0, far, 4096, write, 0)
			r.Offer(0)
		}},
		{"receive index", "available index", 0, func(_ *vsocktest.Driver, r *vsocktest.Ring) { r.SetAvailIdx(5000) }},
		{"memory taken away", "guest memory", 1, func(d *vsocktest.Driver, _ *vsocktest.Ring) { _ = d.Truncate() }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			u, d := newDevice(t, vsock.UserConfig{}, vsocktest.DriverConfig{})
			if err := d.Start(); err != nil {
				t.Fatal(err)
			}
			dialled := make(chan error, 1)
			go func() { // gives the device something to send
				_, err := u.Dial(context.Background(), 1)
				dialled <- err
			}()
			tt.do(d, d.Rings[tt.ring])
			d.Rings[tt.ring].Kick()
			ends(t, u, tt.want)
			if err := <-dialled; err == nil {
				t.Error("dial on a broken device: no error")
			}
		})
	}
}

func TestHostileMessages(t *testing.T) {
	num := func(w ...uint32) (b []byte) {
		for _, v := range w {
			b = binary.NativeEndian.AppendUint32(b, v)
		}
		return b
	}
	words := func(w ...uint64) (b []byte) {
		for _, v := range w {
			b = binary.NativeEndian.AppendUint64(b, v)
		}
		return b
	}
	small, err := unix.MemfdCreate("small", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(small), "small")
	defer f.Close()
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	region := func(gpa, size, uva, off uint64) []byte { return words(gpa, size, uva, off) }
	table := func(r ...[]byte) []byte {
		b := num(uint32(len(r)), 0)
		for _, x := range r {
			b = append(b, x...)
		}
		return b
	}
	for _, tt := range []struct {
		name    string
		req     uint32
		payload []byte
		fds     []int
	}{
		{"features not offered", 2, words(1 << 5), nil},
		{"indirect descriptors not offered", 2, words(1 << 28), nil},
		{"features too short", 2, num(1), nil},
		{"protocol features not offered", 16, words(1 << 40), nil},
		{"table beyond the file", 5, table(region(0, 2<<20, 0, 0)), []int{small}},
		{"table offset wraps", 5, table(region(0, 4096, 0, ^uint64(4095))), []int{small}},
		{"table size wraps", 5, table(region(1<<63, 1<<63, 0, 0)), []int{small}},
		{"table of size zero", 5, table(region(0, 0, 0, 0)), []int{small}},
		{"table of odd size", 5, table(region(0, 5000, 0, 0)), []int{small}},
		{"table overlaps", 5, table(region(0, 8192, 0, 0), region(4096, 4096, 1<<30, 0)), []int{small, small}},
		{"table without descriptors", 5, table(region(0, 4096, 0, 0)), nil},
		{"table with a count too large", 5, num(500, 0), nil},
		{"table of a directory", 5, table(region(0, 4096, 0, 0)), []int{unix.AT_FDCWD}},
		{"region too short", 37, num(1, 2, 3), []int{small}},
		{"remove what is not there", 38, append(num(0, 0), region(0, 4096, 0, 0)...), nil},
		{"ring size zero", 8, num(0, 0), nil},
		{"ring size odd", 8, num(0, 100), nil},
		{"ring size huge", 8, num(0, 65536), nil},
		{"ring index", 8, num(3, 128), nil},
		{"ring base", 10, num(0, 65536), nil},
		{"ring address index", 9, words(99, 0, 0, 0, 0), nil},
		{"ring address short", 9, words(0), nil},
		{"kick is no eventfd", 12, words(0), []int{small}},
		{"kick without a descriptor", 12, words(0), nil},
		{"kick by polling", 12, words(0x100), nil},
		{"call of a wrong ring", 13, words(7), []int{small}},
		{"configuration too long", 24, num(0, 300, 0), nil},
		{"configuration offset", 24, append(num(0xffff_fff0, 0x20, 0), make([]byte, 32)...), nil},
		{"configuration written", 25, append(num(0, 8, 0), make([]byte, 8)...), nil},
		{"message too long", 5, make([]byte, 5000), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			u, d := newDevice(t, vsock.UserConfig{}, vsocktest.DriverConfig{})
			fds := tt.fds
			if len(fds) == 1 && fds[0] == unix.AT_FDCWD {
				dir, err := os.Open(t.TempDir())
				if err != nil {
					t.Fatal(err)
				}
				defer dir.Close()
				fds = []int{int(dir.Fd())}
			}
			if err := d.Tell(tt.req, tt.payload, fds); err == nil && tt.req != 16 {
				t.Error("accepted")
			}
			ends(t, u, "vhost-user")
		})
	}
	t.Run("ring outside of memory", func(t *testing.T) {
		u, d := newDevice(t, vsock.UserConfig{}, vsocktest.DriverConfig{})
		if err := d.Rings[0].Start(); err == nil { // no memory yet
			t.Error("accepted")
		}
		ends(t, u, "outside of guest memory")
	})
	t.Run("unknown request", func(t *testing.T) {
		u, d := newDevice(t, vsock.UserConfig{}, vsocktest.DriverConfig{})
		if err := d.Tell(77, nil, nil); err == nil {
			t.Error("accepted")
		}
		if _, err := d.Ask(1, nil); err != nil {
			t.Errorf("the device did not survive: %v", err)
		}
		_ = d.Close()
		<-u.Done()
		if err := u.Err(); err != nil {
			t.Error(err)
		}
	})
}

// TestNothingLeaks runs a device to its end many times.
func TestNothingLeaks(t *testing.T) {
	count := func() int {
		e, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(e)
	}
	run := func() {
		u, err := vsock.NewUser(vsock.UserConfig{Logger: logger(t), HybridPath: t.TempDir() + "/s"})
		if err != nil {
			t.Fatal(err)
		}
		d, err := vsocktest.NewDriver(u.QEMUFile(), vsocktest.DriverConfig{})
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Start(); err != nil {
			t.Fatal(err)
		}
		_ = d.Tell(13, make([]byte, 8), []int{0, 1, 2}) // refused; the descriptors are closed
		<-u.Done()
		_ = d.Close()
		d.Free()
		_ = u.Close()
	}
	run()
	before, goroutines := count(), runtime.NumGoroutine()
	for range 10 {
		run()
	}
	if after := count(); after > before {
		t.Errorf("%d open files before, %d after", before, after)
	}
	// A goroutine that has told its owner of its end may still be on its way out.
	for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > goroutines && time.Now().Before(end); {
		runtime.Gosched()
	}
	if after := runtime.NumGoroutine(); after > goroutines {
		t.Errorf("%d goroutines before, %d after", goroutines, after)
	}
}
