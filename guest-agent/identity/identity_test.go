// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// Each guest has a machine id of its own, in the form of machine-id(5); a root
// without /etc has none.
func TestMachineID(t *testing.T) {
	form := regexp.MustCompile(`^[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}\n$`)
	seen := map[string]bool{}
	path := filepath.Join(t.TempDir(), "machine-id")
	for range 20 { // the file is there, with that of the saved guest
		if err := newMachineID(path); err != nil {
			t.Fatal(err)
		}
		id, err := os.ReadFile(path)
		if err != nil || !form.Match(id) || seen[string(id)] {
			t.Fatalf("machine id %q, %v; %d before it", id, err, len(seen))
		}
		seen[string(id)] = true
	}
	if err := newMachineID(filepath.Join(t.TempDir(), "etc", "machine-id")); err != nil {
		t.Errorf("without a directory for it: %v", err)
	}
}
