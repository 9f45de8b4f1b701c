// SPDX-License-Identifier: Apache-2.0

// Package ledger remembers everything of a sandbox that outlives a killed shim,
// so that whoever comes next can remove it.
//
// Each sandbox has one directory <root>/<key>, with two files of this package:
//
//	lock    byte 0 is write-locked by the shim as long as it lives, byte 1 by
//	        whoever reaps. The lock belongs to the open file description (fcntl
//	        F_OFD_SETLK), so the start command takes it and the daemon that it
//	        leaves behind inherits it with the descriptor.
//	ledger  lines of JSON, only ever appended to.
//
// The directory's other content belongs to the sandbox and goes with it.
//
//	           Create                 Adopt              Close (all forgotten)
//	(nothing) ───────> held by start ───────> held by shim ───────> (nothing)
//	    ^                   │ killed              │ killed              ^
//	    │                   v                     v                     │
//	    └─────────────── dead: lock free ───> Reap (byte 1 locked) ─────┘
//
// The rule that makes it work: Record before acquiring, Forget after releasing.
// An entry may therefore name something that does not exist yet or any more;
// undoing it is then no error.
//
// # Format, version 1
//
// The first line is the header: {"ledger":1,"sandbox":…,"namespace":…,"bundle":…,
// "shim":{"pid":…,"start":…},"created":RFC 3339,"build":…,"boot":…}. boot is
// /proc/sys/kernel/random/boot_id: after a reboot only what lies on disk is left.
// Every other line has one of these:
//
//	{"add":<n>,"kind":…,…}       entry n was recorded
//	{"del":<n>}                  entry n was forgotten or undone
//	{"owner":{"pid":…,"start":…}} the shim is now this process
//
// A line that does not parse was torn by a kill; its Record did not return, so
// nothing was acquired under it and it is skipped. A kind that is not known comes
// from a newer build: it is left, reported, and keeps the directory alive. A
// change that older builds would misread gets a new version number, which they
// refuse; every version stays in testdata and is reaped for ever.
package ledger
