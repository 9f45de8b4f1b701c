// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"sync"
	"testing"
)

// However many hypervisors a process has, and whoever asks first, KVM is proven once for each mode.
func TestOneProof(t *testing.T) {
	var c choices
	var mu sync.Mutex
	proven := map[string]int{}
	prove := func(_ context.Context, mode string) (string, string, error) {
		mu.Lock()
		defer mu.Unlock()
		proven[mode]++
		return "runs on " + mode, "", nil
	}
	var wg sync.WaitGroup
	for range 4 {
		for _, mode := range []string{"auto", "kvm"} {
			choose := c.of(mode, prove)
			wg.Go(func() {
				if a, err := choose(); err != nil || a.name != "runs on "+mode {
					t.Errorf("%s: %+v, %v", mode, a, err)
				}
			})
		}
	}
	wg.Wait()
	if proven["auto"] != 1 || proven["kvm"] != 1 {
		t.Errorf("proven %v; want each once", proven)
	}
}
