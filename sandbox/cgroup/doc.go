// SPDX-License-Identifier: Apache-2.0

// Package cgroup keeps a pod's processes on the host, the VMM, the virtio-fs
// daemon and the shim, in the cgroup that the pod's engine chose, so that the
// limits and the accounting of the pod's parent hold for all of them.
//
//	Host.Plan          Open                                    Close
//	(pure) ──> Plan ───────> Group: this process is inside,  ──────────> nothing of it left,
//	                         children are born inside                    this process is back
//
// Three forms, one behaviour: version 1 (a directory in each hierarchy), version 2
// (one directory), and on either a scope of systemd, which is asked for over D-Bus
// and whose directories are used like the others afterwards.
//
// What a Group made is in the ledger before it exists. Its own directories are
// emptied by SIGKILL and removed by whoever reaps; directories above them that had
// to be made are removed when they are empty, and those that were there before, the
// engine's, are never touched.
package cgroup
