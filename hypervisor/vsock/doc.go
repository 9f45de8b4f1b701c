// SPDX-License-Identifier: Apache-2.0

// Package vsock is the host end of one machine's virtio-vsock device (virtio
// 1.3 §5.10): either the kernel's vhost-vsock (Kernel) or a vhost-user device
// of our own that runs inside this process (User). Both are a Device. The suite
// in vsocktest says what that means.
//
// # Trust
//
// The guest of a User is hostile, and so is a QEMU that it has taken over. What
// they can choose, and what holds whatever they choose:
//
//	ring size            a power of two, 2 to maxRingSize
//	available index      at most the ring's size ahead of ours
//	chain                at most as long as its table; buffers of one direction
//	indirect table       never: not offered
//	buffer               inside of guest memory, without wrapping
//	packet               header whole, copied before it is looked at; payload inside of its chain
//	stream               its name at most once; every other packet is answered by one RST
//	receive credit       at most what was granted, else the stream is reset
//	send credit          believed: a lie stalls or floods the guest's own stream
//	memory table         maxRegions whole-page regions of regular files that hold them, no overlap
//	requests             at most maxMsgPayload bytes and maxMsgFDs descriptors; exactly those that the request has
//
// A wrong stream is reset. A wrong ring or request ends the device, and with it
// this machine's streams; the process and its other devices go on. Memory that
// vanishes under the device ends it too.
//
// # Memory
//
// At worst one guest makes this process hold, in bytes:
//
//	maxGranted             48 MiB  received and not read, by streams of any state
//	maxConns of 1 KiB       4 MiB  streams
//	maxBacklog of 1 KiB   0.1 MiB  streams of each listener that were reset before they were accepted
//	maxResets of 16 bytes  64 KiB  resets
//	two rings               3 MiB  maxRingSize descriptors across maxRegions regions
//
// some 56 MiB, and less than 1 MiB while streams are read as they come.
// Sending holds nothing: a Write lends its own buffer. The collector may keep as
// much again for a while (GOGC). Guest memory that is mapped is not counted.
//
// # Rest
//
// A device whose guest is quiet runs no code: there are no timers but those of
// deadlines and of streams that were closed less than lingerTime ago.
package vsock
