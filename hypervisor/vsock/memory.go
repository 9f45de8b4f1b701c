// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// maxRegions bounds the pieces of guest memory that are mapped at once: RAM
// below and above the holes of a PC plus what is plugged later.
const maxRegions = 64

// region is one mapped piece of guest memory.
type region struct {
	gpa, size uint64 // guest-physical address and length, bytes
	uva       uint64 // address in the VMM, by which rings are named
	mem       []byte // the size bytes themselves
	mapping   []byte // what mmap returned; covers mem, nil in tests
}

// memory is the guest's RAM, sorted by gpa and free of overlaps.
type memory []*region

// regionDesc is one entry of SET_MEM_TABLE or ADD_MEM_REG.
type regionDesc struct {
	gpa, size, uva, offset uint64
}

// mapRegion maps what d describes from fd, which stays the caller's.
func mapRegion(fd int, d regionDesc) (*region, error) {
	page := uint64(unix.Getpagesize())
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return nil, fmt.Errorf("statfs of the memory file: %w", err)
	}
	if fs.Type == unix.HUGETLBFS_MAGIC && fs.Bsize > 0 {
		page = uint64(fs.Bsize)
	}
	if d.size == 0 || d.size%uint64(unix.Getpagesize()) != 0 || d.gpa+d.size < d.gpa || d.uva+d.size < d.uva ||
		d.offset+d.size < d.offset || d.gpa%8 != 0 || d.uva%8 != 0 || d.offset%8 != 0 {
		return nil, fmt.Errorf("memory region gpa=%#x size=%#x uva=%#x offset=%#x: want whole pages without overflow", d.gpa, d.size, d.uva, d.offset)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat of the memory file: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || uint64(st.Size) < d.offset+d.size {
		return nil, fmt.Errorf("memory region ends at %#x of a file of %#x bytes (mode %#o): want a regular file that holds it", d.offset+d.size, st.Size, st.Mode)
	}
	// Huge pages must be mapped at a multiple of their size.
	start := d.offset / page * page
	length := (d.offset - start + d.size + page - 1) / page * page
	m, err := unix.Mmap(fd, int64(start), int(length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("map %#x bytes of guest memory: %w", length, err)
	}
	// The guest's memory is no part of a core dump of ours; failure costs only disk.
	_ = unix.Madvise(m, unix.MADV_DONTDUMP)
	off := d.offset - start
	return &region{gpa: d.gpa, size: d.size, uva: d.uva, mem: m[off : off+d.size : off+d.size], mapping: m}, nil
}

func (r *region) unmap() {
	if r.mapping != nil {
		_ = unix.Munmap(r.mapping)
		r.mapping, r.mem = nil, nil
	}
}

func (m memory) unmap() {
	for _, r := range m {
		r.unmap()
	}
}

// with returns m and r, sorted; an error if r overlaps a region of m.
func (m memory) with(r *region) (memory, error) {
	if len(m) >= maxRegions {
		return nil, fmt.Errorf("more than %d memory regions", maxRegions)
	}
	n := append(slices.Clone(m), r)
	slices.SortFunc(n, func(a, b *region) int {
		if a.gpa < b.gpa {
			return -1
		}
		return 1
	})
	for i := 1; i < len(n); i++ {
		if n[i-1].gpa+n[i-1].size > n[i].gpa {
			return nil, fmt.Errorf("memory regions overlap at gpa %#x", n[i].gpa)
		}
	}
	return n, nil
}

// guest returns the bytes at guest-physical addr: n of them, or fewer when the
// region ends before.
func (m memory) guest(addr, n uint64) ([]byte, error) {
	for _, r := range m {
		if addr-r.gpa < r.size { // wraps to a huge value below gpa
			off := addr - r.gpa
			return r.mem[off : off+min(n, r.size-off)], nil
		}
	}
	return nil, fmt.Errorf("guest address %#x is outside of its memory", addr)
}

// user returns exactly n bytes at an address of the VMM.
func (m memory) user(addr, n uint64) ([]byte, error) {
	for _, r := range m {
		if off := addr - r.uva; off < r.size && n <= r.size-off {
			return r.mem[off : off+n : off+n], nil
		}
	}
	return nil, fmt.Errorf("ring of %d bytes at VMM address %#x is outside of guest memory", n, addr)
}
