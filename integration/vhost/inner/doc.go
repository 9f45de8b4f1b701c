// SPDX-License-Identifier: Apache-2.0

// Package inner holds the tests that need a host with the kernel's vhost-vsock:
// `make test-vhost` boots one (integration/vhost) and runs them in it as root.
// Everywhere else they do nothing, and say so.
package inner

// What the machine that boots and the machine that is booted agree upon.
const (
	// RunParam and FailFastParam are kernel parameters: a pattern of tests, as for
	// go test -run, and the wish to end with the first failure.
	RunParam      = "vhost.run"
	FailFastParam = "vhost.failfast"
	// ResultMark precedes the tests' exit status on the console.
	ResultMark = "vhost: the tests have ended with status "
	// Env is set, to anything, where the tests are to run.
	Env = "KATA_VHOST_HOST"

	// Program is the path of the tests' program there.
	Program = "/test/inner"
	// GuestInitrd is the path of a guest that serves vsocktest/guestsvc.
	GuestInitrd = "/test/guest.img"
	// BuildDir holds bin/ and images/, LabDir the lab's programs.
	BuildDir = "/build"
	LabDir   = "/lab"
)
