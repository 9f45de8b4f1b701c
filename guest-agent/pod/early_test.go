// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
)

// TestEndBeforeStart: a start that comes too late says how the container ended,
// one of a container that has run does not.
func TestEndBeforeStart(t *testing.T) {
	p, _ := newPod(t)
	if err := createErr(t, p, request("a", "true")); err != nil {
		t.Fatal(err)
	}
	c, err := p.Container("a")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Signal("a", unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.Wait(bound(t), ""); err != nil {
		t.Fatal(err)
	}
	if err := c.Start(bound(t)); fault.KindOf(err) != fault.FailedPrecondition || !strings.Contains(err.Error(), "status 137") || !strings.Contains(err.Error(), "memory limit") {
		t.Errorf("killed before its start: %v", err)
	}
	c = run(t, p, "b", "exit 5")
	if _, _, err := c.Wait(bound(t), ""); err != nil {
		t.Fatal(err)
	}
	if err := c.Start(bound(t)); fault.KindOf(err) != fault.FailedPrecondition || strings.Contains(err.Error(), "before") {
		t.Errorf("ended in the ordinary way: %v", err)
	}
}
