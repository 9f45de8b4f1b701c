// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// BlockfileBytes is the size of a root filesystem of the blockfile snapshotter: it
// copies the lab's scratch file, which is empty and sparse.
const BlockfileBytes = 32 << 20

func (c *Containerd) scratchFile() string { return filepath.Join(c.Root, "scratch.ext4") }

// makeScratch makes the file that each snapshot of the blockfile snapshotter begins as.
func (c *Containerd) makeScratch() error {
	f, err := os.Create(c.scratchFile())
	if err != nil {
		return fmt.Errorf("lab: scratch file: %w", err)
	}
	defer f.Close()
	if err := f.Truncate(BlockfileBytes); err != nil {
		return fmt.Errorf("lab: scratch file: %w", err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", f.Name()).CombinedOutput(); err != nil {
		return fmt.Errorf("lab: scratch file: mkfs.ext4: %w: %s", err, out)
	}
	return nil
}
