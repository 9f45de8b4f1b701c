// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/hypervisor"
)

// The superblock of EROFS (kernel fs/erofs/erofs_fs.h, struct erofs_super_block):
// offsets of its fields, little endian, and what they may hold.
const (
	erofsSuperOffset   = 1024
	erofsSuperBytes    = 128
	erofsMagic         = 0xE0F5E1E2
	erofsBlockBitsAt   = 12
	erofsBlocksAt      = 36
	erofsIncompatAt    = 80
	erofsDevicesAt     = 86
	erofsDeviceTableAt = 88
	erofsIncompatTable = 0x8 // EROFS_FEATURE_INCOMPAT_DEVICE_TABLE
	erofsSlotBytes     = 128 // struct erofs_deviceslot: tag[64], blocks, mapped_blkaddr
	erofsSlotBlocksAt  = 64
	erofsSlotMappedAt  = 68
)

// maxErofsDevices bounds a device table, which the image's maker wrote: the guest
// names that many devices within the page of options that mount(2) takes.
const maxErofsDevices = 200

// erofsSuper is what matters here of a superblock. Lengths and places are in bytes.
type erofsSuper struct {
	size    uint64 // of the image's own blocks
	devices []erofsDevice
}

// erofsDevice is an entry of the device table: where the data lies when all
// devices are seen as one.
type erofsDevice struct{ at, size uint64 }

// readErofs reads and checks the superblock of a layer.
func readErofs(f *os.File) (*erofsSuper, error) {
	b := make([]byte, erofsSuperBytes)
	if err := readFull(f, b, erofsSuperOffset); err != nil {
		return nil, fmt.Errorf("no EROFS superblock: %w", err)
	}
	if m := binary.LittleEndian.Uint32(b); m != erofsMagic {
		return nil, fmt.Errorf("not an EROFS image: magic %#x, want %#x: %w", m, uint32(erofsMagic), errdefs.ErrInvalidArgument)
	}
	bits := b[erofsBlockBitsAt]
	if bits < 9 || bits > 16 {
		return nil, fmt.Errorf("EROFS block size of 2^%d bytes: want 2^9 to 2^16: %w", bits, errdefs.ErrInvalidArgument)
	}
	s := &erofsSuper{size: uint64(binary.LittleEndian.Uint32(b[erofsBlocksAt:])) << bits}
	if binary.LittleEndian.Uint32(b[erofsIncompatAt:])&erofsIncompatTable == 0 {
		return s, nil
	}
	count := int(binary.LittleEndian.Uint16(b[erofsDevicesAt:]))
	if count > maxErofsDevices {
		return nil, fmt.Errorf("EROFS device table of %d entries: at most %d are possible: %w", count, maxErofsDevices, errdefs.ErrInvalidArgument)
	}
	table := make([]byte, count*erofsSlotBytes)
	if err := readFull(f, table, int64(binary.LittleEndian.Uint16(b[erofsDeviceTableAt:]))*erofsSlotBytes); err != nil {
		return nil, fmt.Errorf("EROFS device table: %w", err)
	}
	for i := range count {
		slot := table[i*erofsSlotBytes:]
		s.devices = append(s.devices, erofsDevice{
			at:   uint64(binary.LittleEndian.Uint32(slot[erofsSlotMappedAt:])) << bits,
			size: uint64(binary.LittleEndian.Uint32(slot[erofsSlotBlocksAt:])) << bits,
		})
	}
	return s, nil
}

// readFull reads all of b; a file that ends before is truncated.
func readFull(f *os.File, b []byte, at int64) error {
	if _, err := f.ReadAt(b, at); err != nil {
		if errors.Is(err, io.EOF) {
			return fmt.Errorf("the file ends within: %w", errdefs.ErrInvalidArgument)
		}
		return err
	}
	return nil
}

// sizeOf is the size in bytes of a file or block device.
func sizeOf(f *os.File) (uint64, error) {
	end, err := f.Seek(0, io.SeekEnd)
	return uint64(max(end, 0)), err
}

// region is an EROFS with its devices as one run of bytes, as the guest's kernel
// reads it when it is given no devices (flat, Linux 6.4). With whole, each file is
// there to its end, a hash tree included, and a kernel has to be given the devices.
func (s *erofsSuper) region(meta *os.File, devices []*os.File, whole bool) ([]hypervisor.DiskPart, error) {
	if len(devices) != len(s.devices) {
		return nil, fmt.Errorf("%d devices are given, the EROFS device table has %d: %w", len(devices), len(s.devices), errdefs.ErrInvalidArgument)
	}
	parts := []hypervisor.DiskPart{{File: meta}}
	var start uint64 // of the last part
	for i, d := range s.devices {
		if d.at <= start || d.at%hypervisor.SectorBytes != 0 || i == 0 && d.at < s.size {
			return nil, fmt.Errorf("device %d lies at byte %d, not behind what comes before it: %w", i, d.at, errdefs.ErrInvalidArgument)
		}
		if parts[i].Sectors = (d.at - start) / hypervisor.SectorBytes; whole {
			size, err := sizeOf(parts[i].File)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", parts[i].File.Name(), err)
			}
			parts[i].Sectors = sectors(size)
		}
		size, err := sizeOf(devices[i])
		if err != nil {
			return nil, fmt.Errorf("device %d: %w", i, err)
		}
		if size < d.size {
			return nil, fmt.Errorf("device %d (%s) has %d bytes, the EROFS device table says %d: it is truncated: %w", i, devices[i].Name(), size, d.size, errdefs.ErrInvalidArgument)
		}
		parts = append(parts, hypervisor.DiskPart{File: devices[i], Sectors: sectors(max(size, d.size))})
		start = d.at
	}
	return parts, nil
}

// within checks that a file of size bytes holds the data of its devices itself, as
// tar streams behind an index do (containerd's enable_tar_index).
func (s *erofsSuper) within(size uint64) error {
	for i, d := range s.devices {
		if d.at < s.size || d.at+d.size > size {
			return fmt.Errorf("device %d of the EROFS device table is at bytes %d to %d of a file of %d, and no device= option names it: %w",
				i, d.at, d.at+d.size, size, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// sectors rounds a size up to the layers' alignment on a disk.
func sectors(bytes uint64) uint64 {
	return (bytes + layerAlign - 1) / layerAlign * (layerAlign / hypervisor.SectorBytes)
}
