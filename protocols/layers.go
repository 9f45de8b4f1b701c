// SPDX-License-Identifier: Apache-2.0

package protocols

// Options of the Storages that make up one root filesystem of several layers
// (agent-protocol facts of Kata Containers 4.1, part D, driver erofs.multi-layer).
// All of them have the same mount point, where the guest mounts an overlay; the
// lower ones come topmost first.
const (
	// OptMultiLayer marks a Storage as one of such a group.
	OptMultiLayer = "X-kata.multi-layer=true"
	// OptOverlayLower marks a layer that is read, OptOverlayUpper the one that is
	// written: it has the directories "upper" and "work", made if missing.
	OptOverlayLower = "X-kata.overlay-lower"
	OptOverlayUpper = "X-kata.overlay-upper"
	// OptPartitioned says that the source is a disk with a GUID partition table, and
	// OptPartition which partition the layer is, from 1 on.
	OptPartitioned = "X-kata.gpt-partitioned=true"
	OptPartition   = "X-kata.partition-number="
	// OptVerity says that the layer has a dm-verity hash tree, OptVerityRoot its root
	// hash in hexadecimal, OptVerityOffset the byte of the disk or partition at which
	// the tree's superblock is.
	OptVerity       = "X-kata.dmverity-enabled=true"
	OptVerityRoot   = "X-kata.dmverity.roothash="
	OptVerityOffset = "X-kata.dmverity.hashoffset="
	// OptMemoryUpper asks for an upper directory in the guest's memory.
	OptMemoryUpper = "io.katacontainers.fs-opt.overlay-rw"
	// OptOverlay carries one more option of the overlay. An addition of ours.
	OptOverlay = "io.katacontainers.fs-opt.overlay-option="
	// OptDevicePartition, once for each further device of an EROFS in the order of its
	// device table, is the partition that shows that device's data alone, for kernels
	// that do not read an EROFS with its devices as one (before Linux 6.4). An
	// addition of ours: without it the partition of the layer has all of them. A device
	// with a dm-verity hash tree is "NUMBER:ROOT HASH:OFFSET", in the words of the two
	// options for a layer's; then the partition of the layer has the metadata alone.
	OptDevicePartition = "io.katacontainers.fs-opt.device-partition="
	// OptRootDir, on an upper without lowers, makes this directory of it the root. An
	// addition of ours.
	OptRootDir = "io.katacontainers.fs-opt.root-dir="
)
