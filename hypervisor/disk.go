// SPDX-License-Identifier: Apache-2.0

package hypervisor

import (
	"context"
	"os"
)

// DiskPlugger is implemented by machines that take disks while they run, up to
// Config.HotplugPorts devices of all kinds at a time. The guest must have booted.
type DiskPlugger interface {
	// PlugDisk adds a disk and returns its place in the guest in the form of
	// PlugNIC. The guest may not have found it yet. On error the disk is not there;
	// its files are closed in any case.
	PlugDisk(ctx context.Context, d Disk) (path string, err error)
	// UnplugDisk takes the disk with that ID out, one of Config.Disks too, and
	// returns when the guest has let go of it and its files are closed. A disk that
	// is not there is no error.
	UnplugDisk(ctx context.Context, id string) error
}

// DiskResizer is implemented by machines whose disks can change their size.
type DiskResizer interface {
	// ResizeDisk tells the guest that the disk with that ID has now so many bytes. A
	// regular file is made that long; a block device must be already.
	ResizeDisk(ctx context.Context, id string, bytes uint64) error
}

// SectorBytes is the unit in which the parts of a disk are counted.
const SectorBytes = 512

// Disk is one virtio-blk device. The backend owns the files once Start or
// PlugDisk is called.
type Disk struct {
	// ID names the disk; it is unique in its machine, of letters and digits, and at
	// most 20 bytes long: the guest reads it as the disk's serial number.
	ID string
	// Parts are what the disk consists of, one after the other. One part is the
	// whole of a file or block device; several need ReadOnly, and are regular files.
	Parts []DiskPart
	// ReadOnly disks may be open in any number of machines.
	ReadOnly bool
	// Place is where the disk of a restored machine was (Config.Whole), in the form of
	// PlugDisk. Empty, as in any other machine, leaves it to the backend.
	Place string
}

// DiskPart is a file as a piece of a disk.
type DiskPart struct {
	File *os.File
	// Sectors is the piece's length in units of SectorBytes. A file that is shorter
	// reads as zeros beyond its end. It means nothing for a disk of one part.
	Sectors uint64
}

// Close closes the files of a disk that no backend has taken over.
func (d Disk) Close() {
	for _, p := range d.Parts {
		p.File.Close()
	}
}
