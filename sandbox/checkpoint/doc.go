// SPDX-License-Identifier: Apache-2.0

// Package checkpoint keeps pods that were saved, each in a directory of its own:
//
//	manifest.json   what it is, sizes and digests; written last
//	memory          the guest's memory; what is zero has no space
//	state           the devices
//	disk-<id>       what was on a disk that is written
//
// Read-only disks are not kept: their digests are, and whoever restores brings
// the same. A directory without a manifest is not a checkpoint.
//
// # Trust
//
// Whoever writes these files decides what the VMM loads into itself and what runs
// in the guest. So all of them, and the directory, are root's and writable by
// nobody else, or they are refused.
package checkpoint

import "time"

// Service is the shim's ttrpc service for kata-ctl, and MethodSave its call:
// agentpb.SaveRequest, answered by an empty message.
const (
	Service    = "kata.shim.Checkpoint"
	MethodSave = "Save"
)

// Timeout bounds the saving of a pod, whose memory and disks are written.
const Timeout = 10 * time.Minute
