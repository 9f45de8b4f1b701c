// SPDX-License-Identifier: Apache-2.0

// Package sandbox is the pod: one virtual machine, the containers in it and
// their processes.
//
//	sandbox:    created ──Start──▶ running ──Stop, or the machine ends──▶ stopped
//
//	container,  created ──Start──▶ running ──exit──▶ stopped ──Delete──▶ (gone)
//	process:       │                 │ ▲
//	               │           Pause ▼ │ Resume        (containers only)
//	               │               paused ──exit──▶ stopped
//	               └────── exit (killed before Start) ──▶ stopped
//
// The transitions are the table in state.go. The first container's creation
// starts the machine: what it needs is planned first (plan.go, spec.go: pure
// functions of specification and configuration), then acquired with an undo for
// each step. Its deadline is the boot's: a first creation that is given up takes
// the pod with it. No lock is held across I/O or a call to the guest.
//
// When the machine ends, whatever the cause, every process ends with exit
// status 137 at once and every call returns the cause.
package sandbox
