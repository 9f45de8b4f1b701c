// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Ids of virtio devices in the form of sysfs (virtio 1.3 §5).
const (
	VirtioBalloon = "0x0005"
	VirtioMem     = "0x0018"
)

// virtio lists the machine's virtio devices of one kind: their directories below sys.
func virtio(sys, id string) (dirs []string) {
	files, _ := filepath.Glob(filepath.Join(sys, "bus/virtio/devices/*/device"))
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) == id {
			dirs = append(dirs, filepath.Dir(f))
		}
	}
	return dirs
}

// EnsureVirtio loads the driver of a kind of virtio device when the machine has
// one that no driver works for yet.
func (m *Modules) EnsureVirtio(sys, id, module string) error {
	for _, dir := range virtio(sys, id) {
		if _, err := os.Stat(filepath.Join(dir, "driver")); !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := m.LoadByName(module, nil); err != nil {
			return fmt.Errorf("driver of virtio device %s: %w", id, err)
		}
	}
	return nil
}
