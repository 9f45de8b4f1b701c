// SPDX-License-Identifier: Apache-2.0

package vsock_test

import (
	"encoding/binary"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/hypervisor/vsock"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest"
)

// highUVA is where the driver's rings are in its VMM, ringUVA a place for one more.
const (
	highUVA = 0x7f10_0000_0000
	ringUVA = highUVA + 0x100000
)

func payload(w ...uint64) (b []byte) {
	for _, v := range w {
		b = binary.NativeEndian.AppendUint64(b, v)
	}
	return b
}

// entry is the payload of a request about a ring: index and number.
func entry(index, n uint32) []byte { return payload(uint64(n)<<32 | uint64(index)) }

// memfd is an empty file of n bytes; closed after the test.
func memfd(t *testing.T, n int64) int {
	t.Helper()
	fd, err := unix.MemfdCreate("memory", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "memory")
	t.Cleanup(func() { _ = f.Close() })
	if err := f.Truncate(n); err != nil {
		t.Fatal(err)
	}
	return int(f.Fd())
}

func eventfd(t *testing.T) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

// TestHostileOrder sends requests that are well formed but come with the wrong
// descriptors or at the wrong time. The last one is refused, the device ends.
func TestHostileOrder(t *testing.T) {
	region := func(gpa, size uint64) []byte { return payload(0, gpa, size, gpa, 0) }
	for _, tt := range []struct {
		name, want string
		do         func(t *testing.T, d *vsocktest.Driver) error
	}{
		{"kick with two descriptors", "2 descriptors", func(t *testing.T, d *vsocktest.Driver) error {
			return d.Tell(12, payload(0), []int{eventfd(t), eventfd(t)})
		}},
		{"call with two descriptors", "2 descriptors", func(t *testing.T, d *vsocktest.Driver) error {
			return d.Tell(13, payload(0), []int{eventfd(t), eventfd(t)})
		}},
		{"more descriptors than any request has", "too many descriptors", func(t *testing.T, d *vsocktest.Driver) error {
			return d.Tell(3, nil, []int{0, 1, 2, 0, 1, 2, 0, 1, 2})
		}},
		{"a hundred descriptors", "too many descriptors", func(t *testing.T, d *vsocktest.Driver) error {
			return d.Tell(3, nil, make([]int, 100))
		}},
		{"table with a descriptor too many", "1 memory regions, 2 descriptors", func(t *testing.T, d *vsocktest.Driver) error {
			fd := memfd(t, 1<<20)
			return d.Tell(5, append(entry(1, 0), payload(0, 4096, 0, 0)...), []int{fd, fd})
		}},
		{"region without a descriptor", "0 descriptors", func(t *testing.T, d *vsocktest.Driver) error {
			return d.Tell(37, region(0, 4096), nil)
		}},
		{"region twice", "overlap", func(t *testing.T, d *vsocktest.Driver) error {
			fd := memfd(t, 1<<20)
			if err := d.Tell(37, region(0, 8192), []int{fd}); err != nil {
				t.Error(err)
			}
			return d.Tell(37, region(4096, 8192), []int{fd})
		}},
		{"regions without end", "more than 64", func(t *testing.T, d *vsocktest.Driver) error {
			fd := memfd(t, 1<<20)
			for i := range uint64(64) {
				if err := d.Tell(37, region(i<<20, 4096), []int{fd}); err != nil {
					t.Error(err)
				}
			}
			return d.Tell(37, region(64<<20, 4096), []int{fd})
		}},
		{"memory of running rings removed", "outside of guest memory", func(t *testing.T, d *vsocktest.Driver) error {
			if err := d.Start(); err != nil {
				t.Error(err)
			}
			return d.Tell(38, payload(0, 0x2_0000_0000, 8<<20, highUVA, 0), nil)
		}},
		{"memory of running rings replaced by none", "outside of guest memory", func(t *testing.T, d *vsocktest.Driver) error {
			if err := d.Start(); err != nil {
				t.Error(err)
			}
			return d.Tell(5, entry(0, 0), nil)
		}},
		{"size of a running ring", "is running", func(t *testing.T, d *vsocktest.Driver) error {
			if err := d.Start(); err != nil {
				t.Error(err)
			}
			return d.Tell(8, entry(1, 1024), nil)
		}},
		{"index of a running ring", "is running", func(t *testing.T, d *vsocktest.Driver) error {
			if err := d.Start(); err != nil {
				t.Error(err)
			}
			return d.Tell(10, entry(0, 77), nil)
		}},
		{"address of a running ring", "is running", func(t *testing.T, d *vsocktest.Driver) error {
			if err := d.Start(); err != nil {
				t.Error(err)
			}
			return d.Tell(9, payload(0, 0, 0, 0, 0), nil)
		}},
		{"ring not aligned", "aligned", func(t *testing.T, d *vsocktest.Driver) error {
			return startAt(t, d, ringUVA+2, ringUVA+0x8000, ringUVA+0x10000)
		}},
		{"ring beyond the end of its region", "outside of guest memory", func(t *testing.T, d *vsocktest.Driver) error {
			return startAt(t, d, highUVA+8<<20-16, ringUVA+0x8000, ringUVA+0x10000)
		}},
		{"ring address wraps", "outside of guest memory", func(t *testing.T, d *vsocktest.Driver) error {
			return startAt(t, d, ^uint64(15), ringUVA+0x8000, ringUVA+0x10000)
		}},
		{"base of no ring", "queue 3", func(_ *testing.T, d *vsocktest.Driver) error {
			_, err := d.Ask(11, entry(3, 0))
			return err
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			u, d := newDevice(t, vsock.UserConfig{}, vsocktest.DriverConfig{})
			if err := tt.do(t, d); err == nil {
				t.Error("accepted")
			}
			ends(t, u, tt.want)
		})
	}
}

// startAt starts ring 0 with its parts at addresses of the VMM.
func startAt(t *testing.T, d *vsocktest.Driver, desc, avail, used uint64) error {
	t.Helper()
	if err := d.SetMemTable(); err != nil {
		t.Error(err)
	}
	for _, r := range []struct {
		req uint32
		b   []byte
		fds []int
	}{{8, entry(0, 128), nil}, {9, payload(0, desc, used, avail, 0), nil}, {12, payload(0), []int{eventfd(t)}}} {
		if err := d.Tell(r.req, r.b, r.fds); err != nil {
			return err
		}
	}
	return d.Tell(18, entry(0, 1), nil)
}

// TestHarmless sends what looks wrong and is none of the device's business: it goes on.
func TestHarmless(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(t *testing.T, d *vsocktest.Driver) error
	}{
		{"event queue with garbage", func(_ *testing.T, d *vsocktest.Driver) error {
			d.Rings[2].SetAvailIdx(5000) // nothing is ever sent there
			d.Rings[2].SetDesc(0, far, 0xffff_ffff, 7, 60000)
			d.Rings[2].Kick()
			return nil
		}},
		{"kicks without a packet", func(_ *testing.T, d *vsocktest.Driver) error {
			for range 1000 {
				for _, r := range d.Rings {
					r.Kick()
				}
			}
			return nil
		}},
		{"rings stopped twice", func(_ *testing.T, d *vsocktest.Driver) error {
			for range 2 {
				for _, r := range d.Rings {
					if err := r.Stop(); err != nil {
						return err
					}
				}
			}
			return d.Start()
		}},
		{"device reset under running rings", func(_ *testing.T, d *vsocktest.Driver) error {
			for range 3 {
				if err := d.Tell(34, nil, nil); err != nil {
					return err
				}
			}
			return nil
		}},
		{"parts of a ring that lie on each other", func(t *testing.T, d *vsocktest.Driver) error {
			if err := d.Rings[0].Stop(); err != nil {
				return err
			}
			return startAt(t, d, ringUVA, ringUVA, ringUVA)
		}},
		{"a descriptor that no request asked for", func(t *testing.T, d *vsocktest.Driver) error {
			return d.Tell(3, nil, []int{memfd(t, 1)})
		}},
		{"memory of a terabyte that holds nothing", func(t *testing.T, d *vsocktest.Driver) error {
			return d.Tell(37, payload(0, 1<<42, 1<<40, 1<<42, 0), []int{memfd(t, 1<<40)})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			u, d := newDevice(t, vsock.UserConfig{}, vsocktest.DriverConfig{})
			if err := d.Start(); err != nil {
				t.Fatal(err)
			}
			if err := tt.do(t, d); err != nil {
				t.Error(err)
			}
			if _, err := d.Ask(1, nil); err != nil {
				t.Errorf("the device has ended: %v, %v", err, u.Err())
			}
			_ = d.Close()
			<-u.Done()
			if err := u.Err(); err != nil {
				t.Error(err)
			}
		})
	}
}
