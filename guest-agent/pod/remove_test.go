// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"os"
	"path/filepath"
	"testing"
)

func TestAnyDisk(t *testing.T) {
	for _, c := range []struct {
		sizes map[string]string
		want  bool
	}{
		{nil, false},
		{map[string]string{"loop0": "0\n", "loop1": "0\n"}, false},
		{map[string]string{"loop0": "0\n", "vda": "2048\n"}, true},
		{map[string]string{"loop0": "8\n"}, true},
	} {
		dir := t.TempDir()
		for name, size := range c.sizes {
			if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, name, "size"), []byte(size), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got := anyDisk(dir); got != c.want {
			t.Errorf("%v: %t; want %t", c.sizes, got, c.want)
		}
	}
	if !anyDisk(filepath.Join(t.TempDir(), "missing")) {
		t.Error("a kernel that lists none: want it to be taken for one that may have some")
	}
}
