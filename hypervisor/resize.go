// SPDX-License-Identifier: Apache-2.0

package hypervisor

import "context"

// MemoryBlock is the unit in which a machine's memory grows and shrinks, in
// bytes: the most that Linux guests of two and more pageblocks handle at once
// (drivers/virtio/virtio_mem.c, sub-block size).
const MemoryBlock = 4 << 20

// CPUResizer is implemented by machines whose vCPUs can be plugged and unplugged
// while they run. The guest must have booted.
type CPUResizer interface {
	// ResizeCPUs gives the machine n vCPUs, from Config.CPUs to Config.MaxCPUs, and
	// says how many it has in the end, also with an error. A guest that does not let
	// go of one is FailedPrecondition: it may take it down and leave it idle. New ones
	// run nothing until the guest brings them up; they may have been there before. A
	// number out of range is InvalidArgument, naming the range.
	ResizeCPUs(ctx context.Context, n int) (have int, err error)
}

// MemoryResizer is implemented by machines whose memory can grow and shrink
// while they run. The guest must have booted and have a driver for it.
type MemoryResizer interface {
	// ResizeMemory gives the machine that many bytes of memory, rounded up to a whole
	// MemoryBlock, from Config.MemoryBytes to Config.MaxMemoryBytes, and says how
	// many it has in the end, also with an error. When ctx is done before the guest
	// has taken or returned everything, the wish remains: what comes later is seen
	// by the next call. A size out of range is InvalidArgument, naming the range.
	ResizeMemory(ctx context.Context, bytes uint64) (have uint64, err error)
}
