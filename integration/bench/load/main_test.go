// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestRun: every part works on the host's own file system and leaves nothing.
func TestRun(t *testing.T) {
	dir := t.TempDir()
	big, tree := filepath.Join(dir, "big"), filepath.Join(dir, "tree")
	if err := os.WriteFile(big, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(tree, "a", "b"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "a", "b", "c"), []byte("small"), 0o644); err != nil {
		t.Fatal(err)
	}
	work := filepath.Join(dir, "work")
	if err := run(big, tree, work); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(work); !os.IsNotExist(err) {
		t.Errorf("%s is left: %v", work, err)
	}
	if err := run(filepath.Join(dir, "none"), tree, work); err == nil {
		t.Error("a file that is missing was read")
	}
	if err := copyTree(tree, filepath.Join(dir, "copy")); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "copy", "a", "b", "c")); err != nil || string(got) != "small" {
		t.Errorf("the copy has %q, %v", got, err)
	}
}

func TestOffsets(t *testing.T) {
	a, b := offsets(written), offsets(written)
	if !slices.Equal(a, b) || len(a) != accesses {
		t.Error("two runs read at other places")
	}
	for _, at := range a {
		if at%block != 0 || at < 0 || at+block > written {
			t.Fatalf("offset %d of %d bytes", at, written)
		}
	}
}
