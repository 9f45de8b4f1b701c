// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
)

// TestRun: a container in a machine of its own, its streams apart, its status passed on.
func TestRun(t *testing.T) {
	b := newBox(t)
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	// Without a name of its own it has the host's, as in a new namespace of the host.
	r := b.run("run", nil, "sh", "-c", "echo out; hostname; echo err >&2; exit 7")
	b.want(r, 7, "out\n"+host+"\n")
	if r.Stderr != "err\n" {
		t.Errorf("stderr is %q, want %q", r.Stderr, "err\n")
	}
}

// TestTwentyRuns: one after the other, each the same.
func TestTwentyRuns(t *testing.T) {
	b := newBox(t)
	for i := range 20 {
		b.want(b.run("again", nil, "sh", "-c", fmt.Sprintf("echo run %d", i)), 0, fmt.Sprintf("run %d\n", i))
	}
}

// TestFourAtOnce: machines beside each other do not share anything.
func TestFourAtOnce(t *testing.T) {
	b := newBox(t)
	boots := make([]string, 4)
	var wg sync.WaitGroup
	for i := range boots {
		wg.Go(func() {
			r := b.run(fmt.Sprintf("beside%d", i), nil, "cat", "/proc/sys/kernel/random/boot_id")
			if r.Code != 0 {
				t.Errorf("run %d: status %d: %s", i, r.Code, r.Stderr)
			}
			boots[i] = strings.TrimSpace(r.Stdout)
		})
	}
	wg.Wait()
	seen := map[string]int{}
	for i, boot := range boots {
		if j, ok := seen[boot]; ok || len(boot) != 36 {
			t.Errorf("boot id %q of run %d: want one of its own (run %d has it)", boot, i, j)
		}
		seen[boot] = i
	}
}
