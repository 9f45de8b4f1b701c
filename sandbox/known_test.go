// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"testing"
	"time"
)

func TestKnown(t *testing.T) {
	k := &known{limit: 1000}
	for i, step := range []struct {
		open   int
		forget bool
	}{
		{30, false}, {250, false}, {251, true}, // of none that are in use
		{400, false}, {550, false}, {551, true}, // 400 are
		{900, false}, {925, false}, {926, true}, // near the limit it goes on
		{50, false}, {287, false}, {288, true}, // and knows when they are closed
	} {
		if got := k.look(step.open); got != step.forget {
			t.Errorf("step %d, %d open: %t", i, step.open, got)
		}
		if step.forget {
			k.forgot()
		}
	}
	for limit, want := range map[int]time.Duration{1000: 50 * time.Millisecond, 20_000: 100 * time.Millisecond, 1_000_000: 5 * time.Second} {
		if got := (&known{limit: limit}).interval(); got != want {
			t.Errorf("limit %d: every %v; want %v", limit, got, want)
		}
	}
}
