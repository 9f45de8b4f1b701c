// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"
)

// Split virtqueues (virtio 1.3 §2.7), device side. Everything below is written
// by the guest and may change while it is read: each value is read once,
// checked, then used.

// Descriptor flags (virtio 1.3 §2.7.5).
const (
	descNext     = 1
	descWrite    = 2 // the device writes this buffer
	descIndirect = 4
)

const (
	descSize     = 16
	maxRingSize  = 1024 // what QEMU allows at most
	usedNoNotify = 1    // VIRTQ_USED_F_NO_NOTIFY
	availNoIntr  = 1    // VIRTQ_AVAIL_F_NO_INTERRUPT
)

// errRing is wrapped by every error that a malformed ring causes.
var errRing = errors.New("malformed virtqueue")

// vring is one running split virtqueue. Its owner's mutex guards it.
type vring struct {
	num               uint16
	desc, avail, used []byte
	eventIdx          bool   // VIRTIO_F_EVENT_IDX was negotiated
	next              uint16 // index of the next chain to take from avail
	usedIdx           uint16 // index of the next free entry of used
	signalled         uint16 // usedIdx when the guest was last considered for an interrupt
	usedFlags         uint16
	segs              segments // of the last popped chain; reused
}

// chain is a popped descriptor chain; it is valid until the next pop.
type chain struct {
	head  uint16
	segs  segments
	total uint64 // bytes in segs
}

// ringSizes returns the lengths in bytes of the three parts of a ring of num
// entries, the event words included (virtio 1.3 §2.7).
func ringSizes(num uint16) (desc, avail, used uint64) {
	n := uint64(num)
	return descSize * n, 6 + 2*n, 6 + 8*n
}

// newVring takes up a ring of num entries at index base; its parts are as for place.
func newVring(num, base uint16, desc, avail, used []byte, eventIdx bool) (*vring, error) {
	r := &vring{num: num, eventIdx: eventIdx, next: base}
	if err := r.place(desc, avail, used); err != nil {
		return nil, err
	}
	// The used index continues where the guest last saw it.
	r.usedIdx = uint16(atomic.LoadUint32(word(used, 0)) >> 16)
	r.signalled = r.usedIdx
	return r, nil
}

// validRingSize reports whether a ring may have num entries.
func validRingSize(num uint32) bool {
	return num >= 2 && num <= maxRingSize && num&(num-1) == 0
}

// place checks the three parts of the ring and works on them from now on.
func (r *vring) place(desc, avail, used []byte) error {
	if !validRingSize(uint32(r.num)) {
		return fmt.Errorf("%w: %d entries; want a power of two from 2 to %d", errRing, r.num, maxRingSize)
	}
	d, a, u := ringSizes(r.num)
	if uint64(len(desc)) != d || uint64(len(avail)) != a || uint64(len(used)) != u {
		return fmt.Errorf("%w: parts of %d, %d, %d bytes; want %d, %d, %d", errRing, len(desc), len(avail), len(used), d, a, u)
	}
	// avail may lie on 2 bytes by the letter, but its first word is read
	// atomically and every driver aligns it with the descriptors before it.
	for _, p := range [][]byte{desc, avail, used} {
		if uintptr(unsafe.Pointer(&p[0]))%4 != 0 {
			return fmt.Errorf("%w: part not aligned to 4 bytes", errRing)
		}
	}
	r.desc, r.avail, r.used = desc, avail, used
	return nil
}

// word is the 32-bit word at a multiple of 4 in b, for atomic access. Go has no
// 16-bit atomics; both index words lie in the upper half of such a word.
func word(b []byte, off int) *uint32 { return (*uint32)(unsafe.Pointer(&b[off])) }

// store publishes flags and index of the used ring. It is a full barrier
// between what was written before and what is read after.
func (r *vring) store() {
	atomic.StoreUint32(word(r.used, 0), uint32(r.usedIdx)<<16|uint32(r.usedFlags))
}

// pending returns how many chains the guest has made available.
func (r *vring) pending() (uint16, error) {
	idx := uint16(atomic.LoadUint32(word(r.avail, 0)) >> 16)
	n := idx - r.next
	if n > r.num {
		return 0, fmt.Errorf("%w: available index %d is %d past %d in a ring of %d", errRing, idx, n, r.next, r.num)
	}
	return n, nil
}

// pop takes the next chain; ok is false when there is none. write says which
// kind of buffers it must hold: those that the device writes, or those it reads.
func (r *vring) pop(m memory, write bool) (c chain, ok bool, err error) {
	n, err := r.pending()
	if n == 0 || err != nil {
		return chain{}, false, err
	}
	head := binary.LittleEndian.Uint16(r.avail[4+2*uint32(r.next%r.num):])
	c.head = head
	r.segs = r.segs[:0]
	if err := r.walk(m, &c, head, write); err != nil {
		return chain{}, false, fmt.Errorf("%w: chain %d: %w", errRing, head, err)
	}
	c.segs = r.segs
	r.next++
	return c, true, nil
}

// walk follows a chain through the ring's table. Indirect tables are not offered.
func (r *vring) walk(m memory, c *chain, i uint16, write bool) error {
	for steps := uint16(0); ; steps++ {
		if i >= r.num {
			return fmt.Errorf("descriptor %d of a table of %d", i, r.num)
		}
		if steps >= r.num {
			return fmt.Errorf("longer than its table of %d: a loop", r.num)
		}
		// Copied first: the guest may change it between check and use.
		var d [descSize]byte
		copy(d[:], r.desc[int(i)*descSize:])
		addr, length := binary.LittleEndian.Uint64(d[0:]), uint64(binary.LittleEndian.Uint32(d[8:]))
		flags, next := binary.LittleEndian.Uint16(d[12:]), binary.LittleEndian.Uint16(d[14:])
		if flags&descIndirect != 0 {
			return fmt.Errorf("descriptor %d is indirect, which was not offered", i)
		}
		if (flags&descWrite != 0) != write {
			return fmt.Errorf("descriptor %d has flags %#x; this queue has buffers of one direction only", i, flags)
		}
		if err := r.add(m, c, addr, length); err != nil {
			return err
		}
		if flags&descNext == 0 {
			return nil
		}
		i = next
	}
}

// add appends the memory of one descriptor, which may cross regions.
func (r *vring) add(m memory, c *chain, addr, length uint64) error {
	if addr+length < addr {
		return fmt.Errorf("buffer of %d bytes at %#x wraps", length, addr)
	}
	for length > 0 {
		b, err := m.guest(addr, length)
		if err != nil {
			return err
		}
		r.segs = append(r.segs, b)
		c.total += uint64(len(b))
		addr += uint64(len(b))
		length -= uint64(len(b))
	}
	return nil
}

// push gives a chain back with n bytes written to it. The guest sees it after publish.
func (r *vring) push(head uint16, n uint32) {
	e := r.used[4+8*uint32(r.usedIdx%r.num):]
	binary.LittleEndian.PutUint32(e, uint32(head))
	binary.LittleEndian.PutUint32(e[4:], n)
	r.usedIdx++
}

// publish shows the pushed chains to the guest and says whether it wants an
// interrupt for them.
func (r *vring) publish() bool {
	if r.usedIdx == r.signalled {
		return false
	}
	r.store()
	old := r.signalled
	r.signalled = r.usedIdx
	if !r.eventIdx {
		return atomic.LoadUint32(word(r.avail, 0))&availNoIntr == 0
	}
	// used_event follows the avail entries. The word is read whole; it stays
	// within its page, since it is aligned (virtio 1.3 §2.7.10).
	event := uint16(atomic.LoadUint32(word(r.avail, 4+2*int(r.num))))
	return r.usedIdx-event-1 < r.usedIdx-old
}

// arm asks the guest for a kick at its next chain and reports whether chains
// came in meanwhile, so that no kick can be missed.
func (r *vring) arm() (more bool, err error) {
	if r.eventIdx {
		binary.LittleEndian.PutUint16(r.used[4+8*int(r.num):], r.next)
	}
	r.usedFlags = 0
	r.store()
	n, err := r.pending()
	return n > 0, err
}

// disarm tells the guest that kicks are not needed for now. With event indexes
// there is nothing to do: the index that was armed is behind.
func (r *vring) disarm() {
	if !r.eventIdx && r.usedFlags == 0 {
		r.usedFlags = usedNoNotify
		r.store()
	}
}
