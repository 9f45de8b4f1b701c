// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"unicode/utf16"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/hypervisor"
)

// layerAlign is the alignment in bytes of the layers on a disk: a page of the guest.
const layerAlign = 4096

// The GUID partition table (UEFI 2.10 §5.3). It has the usual 128 entries, or more
// when there are more layers; Linux reads 255 partitions at most.
const (
	gptEntryBytes  = 128
	gptMinEntries  = 128
	gptHeaderBytes = 92
	maxPartitions  = 255
)

// linuxData is the partition type "Linux filesystem data",
// 0FC63DAF-8483-4772-8E79-3D69D8477DE4, as it is stored.
var linuxData = [16]byte{0xAF, 0x3D, 0xC6, 0x0F, 0x83, 0x84, 0x72, 0x47, 0x8E, 0x79, 0x3D, 0x69, 0xD8, 0x47, 0x7D, 0xE4}

// partition is one entry, in sectors.
type partition struct{ first, count uint64 }

// region is a run of sectors on the disk, of which a partition shows the first ones.
type region struct{ count, shown uint64 }

// window is a partition that shows a piece of a region: in sectors, from its begin on.
type window struct {
	of        int
	at, count uint64
}

// gpt lays regions out one after the other, and numbers the windows after their
// partitions. head and tail are what comes before the first and after the last of
// them; the same arguments give the same bytes.
func gpt(regions []region, windows []window) (head, tail []byte) {
	entries := max(gptMinEntries, len(regions)+len(windows))
	table := (uint64(entries)*gptEntryBytes + hypervisor.SectorBytes - 1) / hypervisor.SectorBytes
	first := sectors((2 + table) * hypervisor.SectorBytes)
	next := first
	var parts []partition
	for _, r := range regions {
		parts = append(parts, partition{next, r.shown})
		next += r.count
	}
	for _, w := range windows {
		parts = append(parts, partition{parts[w.of].first + w.at, w.count})
	}
	last := next + table // the spare header's sector, after the spare table
	array := gptArray(parts, entries)
	head = make([]byte, first*hypervisor.SectorBytes)
	protectiveMBR(head, last)
	copy(head[hypervisor.SectorBytes:], gptHeader(1, last, 2, first, next-1, array, entries))
	copy(head[2*hypervisor.SectorBytes:], array)
	tail = make([]byte, (table+1)*hypervisor.SectorBytes)
	copy(tail, array)
	copy(tail[table*hypervisor.SectorBytes:], gptHeader(last, 1, next, first, next-1, array, entries))
	return head, tail
}

// gptHeader is the header at sector own; the other one is at alternate.
func gptHeader(own, alternate, table, first, last uint64, array []byte, entries int) []byte {
	b := make([]byte, gptHeaderBytes)
	copy(b, "EFI PART")
	le := binary.LittleEndian
	le.PutUint32(b[8:], 0x00010000) // revision
	le.PutUint32(b[12:], gptHeaderBytes)
	le.PutUint64(b[24:], own)
	le.PutUint64(b[32:], alternate)
	le.PutUint64(b[40:], first)
	le.PutUint64(b[48:], last)
	copy(b[56:], guid(0))
	le.PutUint64(b[72:], table)
	le.PutUint32(b[80:], uint32(entries))
	le.PutUint32(b[84:], gptEntryBytes)
	le.PutUint32(b[88:], crc32.ChecksumIEEE(array[:entries*gptEntryBytes]))
	le.PutUint32(b[16:], crc32.ChecksumIEEE(b))
	return b
}

func gptArray(parts []partition, entries int) []byte {
	b := make([]byte, entries*gptEntryBytes)
	le := binary.LittleEndian
	for i, p := range parts {
		e := b[i*gptEntryBytes:]
		copy(e, linuxData[:])
		copy(e[16:], guid(i+1))
		le.PutUint64(e[32:], p.first)
		le.PutUint64(e[40:], p.first+p.count-1)
		for j, u := range utf16.Encode([]rune(fmt.Sprintf("layer %d", i))) {
			le.PutUint16(e[56+2*j:], u)
		}
	}
	return b
}

// guid only tells the entries of one disk apart; nothing looks for it.
func guid(i int) []byte {
	b := []byte("kata layer disk\x00")
	binary.BigEndian.PutUint16(b[14:], uint16(i))
	b[7], b[8] = 0x40|b[7]&0x0f, 0x80|b[8]&0x3f // version 4, variant 1 (RFC 9562)
	return b
}

// protectiveMBR says to old tools that the disk is taken (UEFI 2.10 §5.2.3).
func protectiveMBR(b []byte, last uint64) {
	e := b[446:]
	copy(e, []byte{0, 0, 2, 0, 0xEE, 0xFF, 0xFF, 0xFF})
	binary.LittleEndian.PutUint32(e[8:], 1)
	binary.LittleEndian.PutUint32(e[12:], uint32(min(last, 0xFFFFFFFF)))
	b[510], b[511] = 0x55, 0xAA
}

// memoryPart is a piece of a disk that is in no file of the host.
func memoryPart(name string, data []byte) (hypervisor.DiskPart, error) {
	fail := func(err error) (hypervisor.DiskPart, error) {
		return hypervisor.DiskPart{}, fmt.Errorf("%s: %w", name, err)
	}
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return fail(err)
	}
	rw := os.NewFile(uintptr(fd), name)
	defer rw.Close()
	if _, err := bytes.NewReader(data).WriteTo(rw); err != nil {
		return fail(err)
	}
	// For reading only, as what is beside it on the disk.
	ro, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail(err)
	}
	// Its name is no path: nobody can open it again by that.
	return hypervisor.DiskPart{File: os.NewFile(uintptr(ro), name), Sectors: uint64(len(data)) / hypervisor.SectorBytes}, nil
}
