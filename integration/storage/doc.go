// SPDX-License-Identifier: Apache-2.0

// Package storage tests root filesystems and volumes that reach the guest on disks,
// under a real containerd with its erofs and blockfile snapshotters. What the guest
// has is read from its /proc, what the machine has from the arguments of QEMU and
// from the host's /proc. It needs root and `make image`.
package storage
