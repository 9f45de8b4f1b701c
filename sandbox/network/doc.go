// SPDX-License-Identifier: Apache-2.0

// Package network connects the devices of a pod's network namespace to its
// virtual machine.
//
//	scan  ──▶ plan ──▶ attach ──▶ configure ──▶ watch ──▶ close
//	(netlink) (pure)   (taps, tc) (agent)       (netlink)  (undo)
//
// A device of the namespace stays what it is; its frames are handed over: with
// tcfilter, the ingress of the device is redirected to a tap whose queues the VMM
// holds, and the tap's to the device; with macvtap, a macvtap in passthru mode
// lies on the device. The guest's device has the same name, hardware address,
// MTU, addresses, routes and static neighbours, so that nobody outside can tell.
//
// Everything is undone in the reverse order, by Close or, when this process was
// killed, from the ledger. A tap ends with the last descriptor of it, a macvtap
// and a redirection do not.
package network
