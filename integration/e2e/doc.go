// SPDX-License-Identifier: Apache-2.0

// Package e2e holds the end-to-end tests: containers in virtual machines through
// a real containerd, driven by ctr, and through the shim's own socket where ctr
// cannot say what a test needs. They need root and what `make image` builds.
//
// All tests of a run share one containerd; each test begins with a snapshot of
// the machine and fails when anything is left against it at its end. A virtual
// machine takes seconds to start, so what can is tested in one pod: containers
// of one group share a machine.
package e2e
