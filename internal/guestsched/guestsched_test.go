// SPDX-License-Identifier: Apache-2.0

package guestsched

import (
	"os"
	"path/filepath"
	"testing"
)

func TestTune(t *testing.T) {
	dir := t.TempDir()
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if err := tune(int(root.Fd())); err != nil {
		t.Errorf("a kernel without the knob: %v", err)
	}
	files := map[string]string{"sched/wakeup_granularity_ns": "15000000", "sched/tunable_scaling": "1"}
	if err := os.Mkdir(filepath.Join(dir, "sched"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name := range files {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := tune(int(root.Fd())); err != nil {
		t.Fatal(err)
	}
	for name, want := range files {
		if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v; want %q", name, b, err, want)
		}
	}
	if err := os.Remove(filepath.Join(dir, "sched/tunable_scaling")); err != nil {
		t.Fatal(err)
	}
	if err := tune(int(root.Fd())); err == nil {
		t.Error("a knob without its scaling: no error")
	}
}
