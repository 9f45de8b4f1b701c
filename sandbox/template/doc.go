// SPDX-License-Identifier: Apache-2.0

// Package template keeps saved machines and starts pods as clones of them.
//
// A template is a machine that has booted and waits for its host, without any
// device of a pod. It is made once for everything that it depends on (Key) and
// then only read:
//
//	<dir>/<digest>.lock          held while the template is made or loaded
//	<dir>/<digest>/manifest.json what it was made of, sizes and digests
//	<dir>/<digest>/memory        the guest's memory; what is zero has no space
//	<dir>/<digest>/state         the devices
//	<dir>/<digest>/live/         one entry for each process that has loaded it
//	<dir>/.new-<digest>          one that is being made
//
// # Memory
//
// QEMU opens the file of a machine's memory for reading and writing, even when
// it maps it privately, and punches what its guest gives back. So no VMM gets the
// template's own file: the memory is loaded into an anonymous file that the
// kernel has sealed against every change, and clones map that one privately.
// Whoever loads it first keeps it open as long as its machine lives and says so
// in live/; others open it there (/proc/<pid>/fd), so all clones share its pages
// while any of them lives. A machine with a virtio-fs device, whose daemon must
// see the guest's memory, gets a copy of its own instead.
//
// # A start
//
//	template is there, and whole  → clone
//	it is not                     → cold boot; it is made when the pod runs
//	it is broken, or restoring
//	fails                         → one warning, cold boot
package template
