// SPDX-License-Identifier: Apache-2.0

package vsocktest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Features of the device as the driver sees them.
const (
	FeatEventIdx = 1 << 29
	featProto    = 1 << 30
	featVersion1 = 1 << 32
)

// Guest memory of the emulated machine: two regions with a hole between them, at
// addresses in the "VMM" that differ from both, as QEMU has it.
const (
	regionSize = 8 << 20
	lowGPA     = 0x1000_0000
	highGPA    = 0x2_0000_0000
	lowUVA     = 0x7f00_0000_0000
	highUVA    = 0x7f10_0000_0000
)

// DriverConfig describes an emulated virtio driver.
type DriverConfig struct {
	// Features the driver accepts: FeatEventIdx or none.
	Features uint64
	// RingSize is the number of entries of each ring; 0 means 128.
	RingSize uint16
}

// Driver is the front-end of a vhost-user device: it does what QEMU and the
// virtio core of a guest's kernel do together.
type Driver struct {
	conf  DriverConfig
	ctl   *net.UnixConn
	memfd *os.File
	mem   []byte // both regions, one after the other
	Rings [3]*Ring
}

// Ring is the driver's side of one split virtqueue.
type Ring struct {
	d          *Driver
	index      uint32
	Num        uint16
	desc       uint64 // guest-physical
	avail      uint64
	used       uint64
	kick, call *os.File
	masked     *os.File // takes the interrupts while the vector is masked
	availIdx   uint16
	lastKick   uint16
	SeenUsed   uint16
	base       uint16
}

// NewDriver takes QEMU's end of the control socket, which it owns from then on,
// and negotiates as QEMU 7.2 does. The rings do not run yet.
func NewDriver(f *os.File, conf DriverConfig) (*Driver, error) {
	if conf.RingSize == 0 {
		conf.RingSize = 128
	}
	c, err := net.FileConn(f)
	_ = f.Close()
	if err != nil {
		return nil, err
	}
	d := &Driver{conf: conf, ctl: c.(*net.UnixConn)}
	if err := d.setup(); err != nil {
		_ = d.Close()
		return nil, err
	}
	return d, nil
}

func (d *Driver) setup() error {
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	d.memfd = os.NewFile(uintptr(fd), "guest")
	if err := d.memfd.Truncate(2 * regionSize); err != nil {
		return err
	}
	if d.mem, err = unix.Mmap(fd, 0, 2*regionSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return err
	}
	if err := d.negotiate(); err != nil {
		return err
	}
	for i := range d.Rings {
		// The rings lie in the upper region, a page apart or more.
		at := uint64(highGPA + i*0x20000)
		r := &Ring{d: d, index: uint32(i), Num: d.conf.RingSize, desc: at, avail: at + 0x8000, used: at + 0x10000}
		for _, f := range []**os.File{&r.kick, &r.call, &r.masked} {
			fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
			if err != nil {
				return err
			}
			*f = os.NewFile(uintptr(fd), "event")
		}
		d.Rings[i] = r
	}
	return nil
}

func (d *Driver) negotiate() error {
	feats, err := d.Ask(1, nil)
	if err != nil {
		return err
	}
	if want := d.conf.Features | featProto | featVersion1; binary.NativeEndian.Uint64(feats)&want != want {
		return fmt.Errorf("features %#x; want %#x among them", feats, want)
	}
	proto, err := d.Ask(15, nil)
	if err != nil {
		return err
	}
	if err := d.Tell(16, words(binary.NativeEndian.Uint64(proto)), nil); err != nil {
		return err
	}
	if err := d.Tell(3, nil, nil); err != nil {
		return err
	}
	config, err := d.Ask(24, append(words(8<<32, 0)[:12], make([]byte, 8)...))
	if err != nil {
		return err
	}
	if len(config) != 20 {
		return fmt.Errorf("configuration of %d bytes", len(config))
	}
	return d.Tell(2, words(d.conf.Features|featProto|featVersion1), nil)
}

// words is a payload of 64-bit numbers.
func words(w ...uint64) (b []byte) {
	for _, v := range w {
		b = binary.NativeEndian.AppendUint64(b, v)
	}
	return b
}

func pair(a, b uint32) []byte { return words(uint64(b)<<32 | uint64(a)) }

func (d *Driver) send(req, flags uint32, payload []byte, fds []int) error {
	b := binary.NativeEndian.AppendUint32(nil, req)
	b = binary.NativeEndian.AppendUint32(b, 1|flags)
	b = binary.NativeEndian.AppendUint32(b, uint32(len(payload)))
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err := d.ctl.WriteMsgUnix(append(b, payload...), oob, nil)
	return err
}

// Ask sends a request and returns the payload of its answer.
func (d *Driver) Ask(req uint32, payload []byte) ([]byte, error) {
	if err := d.send(req, 0, payload, nil); err != nil {
		return nil, err
	}
	return d.answer(req)
}

func (d *Driver) answer(req uint32) ([]byte, error) {
	var h [12]byte
	if _, err := io.ReadFull(d.ctl, h[:]); err != nil {
		return nil, fmt.Errorf("answer to %d: %w", req, err)
	}
	if got := binary.NativeEndian.Uint32(h[:]); got != req {
		return nil, fmt.Errorf("answer to %d; want %d", got, req)
	}
	p := make([]byte, binary.NativeEndian.Uint32(h[8:]))
	_, err := io.ReadFull(d.ctl, p)
	return p, err
}

// Tell sends a request that has no answer of its own and waits until it has
// been acknowledged. SET_PROTOCOL_FEATURES and what precedes it is not.
func (d *Driver) Tell(req uint32, payload []byte, fds []int) error {
	if req == 16 {
		return d.send(req, 0, payload, fds)
	}
	if err := d.send(req, 1<<3, payload, fds); err != nil {
		return err
	}
	p, err := d.answer(req)
	if err != nil {
		return err
	}
	if len(p) != 8 || binary.NativeEndian.Uint64(p) != 0 {
		return fmt.Errorf("request %d: answer %x", req, p)
	}
	return nil
}

// Truncate cuts the memory file to its lower region, as only a broken VMM does.
func (d *Driver) Truncate() error { return d.memfd.Truncate(regionSize) }

// SetMemTable hands over the guest's memory.
func (d *Driver) SetMemTable() error {
	fd := int(d.memfd.Fd())
	p := pair(2, 0)
	p = append(p, words(lowGPA, regionSize, lowUVA, 0)...)
	p = append(p, words(highGPA, regionSize, highUVA, regionSize)...)
	return d.Tell(5, p, []int{fd, fd})
}

// Start hands over memory and starts the rings, as QEMU does on DRIVER_OK.
func (d *Driver) Start() error {
	if err := d.SetMemTable(); err != nil {
		return err
	}
	for _, r := range d.Rings {
		if err := r.Start(); err != nil {
			return fmt.Errorf("ring %d: %w", r.index, err)
		}
	}
	return nil
}

// Start starts one ring.
func (r *Ring) Start() error {
	d, i := r.d, r.index
	uva := func(gpa uint64) uint64 { return gpa - highGPA + highUVA }
	return errors.Join(
		d.Tell(8, pair(i, uint32(r.Num)), nil),
		d.Tell(10, pair(i, uint32(r.base)), nil),
		d.Tell(9, words(uint64(i), uva(r.desc), uva(r.used), uva(r.avail), 0), nil),
		d.Tell(12, words(uint64(i)), []int{int(r.kick.Fd())}),
		d.Tell(13, words(uint64(i)), []int{int(r.call.Fd())}),
		d.Tell(18, pair(i, 1), nil),
	)
}

// Stop stops one ring as QEMU does for a paused machine: Start goes on with it.
func (r *Ring) Stop() error {
	p, err := r.d.Ask(11, pair(r.index, 0))
	if err != nil {
		return err
	}
	r.base = uint16(binary.NativeEndian.Uint32(p[4:]))
	return nil
}

// Reset empties a stopped ring, as the driver of a rebooted guest finds it.
func (r *Ring) Reset() {
	clear(r.d.Mem(r.desc, 0x18000))
	r.base, r.availIdx, r.SeenUsed, r.lastKick = 0, 0, 0, 0
}

// Close ends the machine. Whoever waits for an interrupt gets an error.
func (d *Driver) Close() error {
	_ = d.ctl.Close()
	for _, r := range d.Rings {
		if r != nil {
			_ = r.kick.Close()
			_ = r.call.Close()
			_ = r.masked.Close()
		}
	}
	if d.memfd != nil {
		_ = d.memfd.Close()
	}
	return nil
}

// Free unmaps the memory; nothing may use it any more.
func (d *Driver) Free() {
	if d.mem != nil {
		_ = unix.Munmap(d.mem)
		d.mem = nil
	}
}

// Mem is guest memory by its guest-physical address.
func (d *Driver) Mem(gpa, n uint64) []byte {
	off := gpa - lowGPA
	if gpa >= highGPA {
		off = gpa - highGPA + regionSize
	}
	return d.mem[off : off+n]
}

// SetDesc writes one descriptor.
func (r *Ring) SetDesc(i uint16, addr uint64, length uint32, flags, next uint16) {
	PutDesc(r.d.Mem(r.desc+16*uint64(i), 16), addr, length, flags, next)
}

// PutDesc writes one descriptor to b.
func PutDesc(b []byte, addr uint64, length uint32, flags, next uint16) {
	le := binary.LittleEndian
	le.PutUint64(b, addr)
	le.PutUint32(b[8:], length)
	le.PutUint16(b[12:], flags)
	le.PutUint16(b[14:], next)
}

func (r *Ring) word(gpa uint64) *uint32 { return (*uint32)(unsafe.Pointer(&r.d.Mem(gpa, 4)[0])) }

// SetAvailIdx publishes an index as it is.
func (r *Ring) SetAvailIdx(idx uint16) {
	r.availIdx = idx
	atomic.StoreUint32(r.word(r.avail), uint32(idx)<<16)
}

// Offer makes a chain available.
func (r *Ring) Offer(head uint16) {
	binary.LittleEndian.PutUint16(r.d.Mem(r.avail+4+2*uint64(r.availIdx%r.Num), 2), head)
	r.SetAvailIdx(r.availIdx + 1)
}

// KickIfWanted kicks unless the device has said that it need not be.
func (r *Ring) KickIfWanted() {
	flags := atomic.LoadUint32(r.word(r.used))
	old := r.lastKick
	r.lastKick = r.availIdx
	if r.d.conf.Features&FeatEventIdx != 0 {
		event := uint16(atomic.LoadUint32(r.word(r.used + 4 + 8*uint64(r.Num))))
		if r.availIdx-event-1 >= r.availIdx-old {
			return
		}
	} else if flags&1 != 0 {
		return
	}
	r.Kick()
}

// Kick notifies the device.
func (r *Ring) Kick() { _, _ = r.kick.Write([]byte{1, 0, 0, 0, 0, 0, 0, 0}) }

// Used takes the next chain that the device has given back.
func (r *Ring) Used() (head uint32, n uint32, ok bool) {
	if uint16(atomic.LoadUint32(r.word(r.used))>>16) == r.SeenUsed {
		return 0, 0, false
	}
	e := r.d.Mem(r.used+4+8*uint64(r.SeenUsed%r.Num), 8)
	r.SeenUsed++
	return binary.LittleEndian.Uint32(e), binary.LittleEndian.Uint32(e[4:]), true
}

// WantInterrupt asks for an interrupt at the next used chain and reports whether
// one is there already.
func (r *Ring) WantInterrupt() bool {
	event := r.word(r.avail + 4 + 2*uint64(r.Num))
	atomic.StoreUint32(event, uint32(r.SeenUsed))
	return uint16(atomic.LoadUint32(r.word(r.used))>>16) != r.SeenUsed
}

// Mask keeps interrupts from the driver, Unmask delivers those that came
// meanwhile. A guest's kernel does both whenever it moves an interrupt to another
// CPU. QEMU does not wait for the device to have taken the new eventfd (QEMU
// hw/virtio/vhost.c, vhost_virtqueue_mask and vhost_virtqueue_pending).
func (r *Ring) Mask() error { return r.setCall(r.masked) }

// Unmask: see Mask.
func (r *Ring) Unmask() error {
	if err := r.setCall(r.call); err != nil {
		return err
	}
	var b [8]byte
	if n, _ := unix.Read(int(r.masked.Fd()), b[:]); n == len(b) {
		_, _ = r.call.Write([]byte{1, 0, 0, 0, 0, 0, 0, 0})
	}
	return nil
}

func (r *Ring) setCall(f *os.File) error {
	return r.d.send(13, 0, words(uint64(r.index)), []int{int(f.Fd())})
}

// Wait returns at the next interrupt.
func (r *Ring) Wait() error {
	var b [8]byte
	_, err := r.call.Read(b[:])
	return err
}
