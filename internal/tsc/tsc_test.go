// SPDX-License-Identifier: Apache-2.0

package tsc

import (
	"runtime"
	"testing"
	"time"
)

func TestRate(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		after time.Duration
		ticks uint64
		want  uint64
	}{
		{time.Second, 2_300_000_000, 2_300_000}, {10 * time.Millisecond, 30_000_000, 3_000_000},
		{time.Second, 0, 0}, {0, 100, 0}, {time.Second, 1_000_000, 0}, {time.Millisecond, 1 << 40, 0}, {-time.Second, 100, 0},
	} {
		if got := rate(reading{now, 5}, reading{now.Add(c.after), 5 + c.ticks}); got != c.want {
			t.Errorf("%d ticks in %v: %d kHz; want %d", c.ticks, c.after, got, c.want)
		}
	}
}

// TestKHz: two measurements of the same counter agree.
func TestKHz(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		if got := KHz(); got != 0 {
			t.Errorf("%d kHz of no counter", got)
		}
		return
	}
	a, b := KHz(), KHz()
	if a == 0 || b == 0 || a > b+b/100 || b > a+a/100 {
		t.Errorf("%d and %d kHz", a, b)
	}
}
