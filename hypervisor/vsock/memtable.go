// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// setMemory handles the requests that change what guest memory is mapped.
func (d *User) setMemory(m *message) error {
	switch m.req {
	case reqSetMemTable:
		return d.setMemTable(m)
	case reqAddMemReg:
		return d.addRegion(m)
	default:
		return d.removeRegion(m)
	}
}

func parseRegion(b []byte) regionDesc {
	ne := binary.NativeEndian
	return regionDesc{gpa: ne.Uint64(b), size: ne.Uint64(b[8:]), uva: ne.Uint64(b[16:]), offset: ne.Uint64(b[24:])}
}

const regionDescLen = 32

// setMemTable replaces all of guest memory.
func (d *User) setMemTable(m *message) error {
	if len(m.payload) < 8 {
		return fmt.Errorf("payload of %d bytes; want at least 8", len(m.payload))
	}
	n := int(binary.NativeEndian.Uint32(m.payload))
	if n > tableRegions || n != len(m.fds) || len(m.payload) != 8+n*regionDescLen {
		return fmt.Errorf("%d memory regions, %d descriptors, payload of %d bytes", n, len(m.fds), len(m.payload))
	}
	var mem memory
	for i := range n {
		r, err := mapRegion(m.fds[i], parseRegion(m.payload[8+i*regionDescLen:]))
		if err != nil {
			mem.unmap()
			return err
		}
		grown, err := mem.with(r)
		if err != nil {
			r.unmap()
			mem.unmap()
			return err
		}
		mem = grown
	}
	return d.swapMemory(mem)
}

// singleRegion parses ADD_MEM_REG and REM_MEM_REG: padding and one region.
func (m *message) singleRegion() (regionDesc, error) {
	if len(m.payload) != 8+regionDescLen {
		return regionDesc{}, fmt.Errorf("payload of %d bytes; want %d", len(m.payload), 8+regionDescLen)
	}
	return parseRegion(m.payload[8:]), nil
}

func (d *User) addRegion(m *message) error {
	desc, err := m.singleRegion()
	if err != nil {
		return err
	}
	if len(m.fds) != 1 {
		return fmt.Errorf("%d descriptors; want 1", len(m.fds))
	}
	r, err := mapRegion(m.fds[0], desc)
	if err != nil {
		return err
	}
	mem, err := d.mem.with(r) // only this goroutine changes d.mem
	if err != nil {
		r.unmap()
		return err
	}
	return d.swapMemory(mem)
}

func (d *User) removeRegion(m *message) error {
	desc, err := m.singleRegion()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(d.mem, func(r *region) bool {
		return r.gpa == desc.gpa && r.size == desc.size && r.uva == desc.uva
	})
	if i < 0 {
		return fmt.Errorf("memory region gpa=%#x size=%#x is not mapped", desc.gpa, desc.size)
	}
	return d.swapMemory(slices.Delete(slices.Clone(d.mem), i, i+1))
}

// swapMemory makes mem the guest's memory. Rings that run go on in it.
func (d *User) swapMemory(mem memory) error {
	d.s.mu.Lock()
	old := d.mem
	d.mem = mem
	var errs []error
	for i := range d.queues {
		q := &d.queues[i]
		if q.ring == nil {
			continue
		}
		desc, avail, used, err := q.parts(mem)
		if err == nil {
			err = q.ring.place(desc, avail, used)
		}
		if err != nil {
			// Its old memory goes away now: it may not run for one packet more.
			q.ring = nil
			errs = append(errs, fmt.Errorf("queue %d: %w", i, err))
		}
	}
	d.s.mu.Unlock()
	for _, r := range old {
		if !slices.Contains(mem, r) {
			r.unmap()
		}
	}
	return errors.Join(errs...)
}
