// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"testing"

	"golang.org/x/sys/unix"
)

// nudgeClock sets this machine's clock, by one nanosecond.
func nudgeClock(t *testing.T) {
	t.Helper()
	tx := unix.Timex{Modes: unix.ADJ_SETOFFSET | unix.ADJ_NANO, Time: unix.Timeval{Usec: 1}}
	if _, err := unix.ClockAdjtime(unix.CLOCK_REALTIME, &tx); err != nil {
		t.Fatal(err)
	}
}

// The guest's clock is set at the start, and when the host's is.
func TestClockFollows(t *testing.T) {
	p := newPod(t)
	set := make(chan struct{}, 100)
	p.agent.ClockSet = func() { set <- struct{}{} }
	told := func() {
		t.Helper()
		select {
		case <-set:
		case <-bounded(t).Done():
			t.Fatal("the guest's clock was not set")
		}
	}
	p.start("c1", "sleep")
	told()
	for range 3 {
		nudgeClock(t)
		told()
	}
}
