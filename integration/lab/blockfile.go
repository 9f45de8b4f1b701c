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

func (c *Containerd) scratchFile() string { return filepath.Join(c.Root, "scratch") }

// mkfs are the commands that make a file system in a file as small as BlockfileBytes.
var mkfs = map[string][]string{
	"ext4": {"mkfs.ext4", "-q", "-F"},
	"xfs":  {"mkfs.xfs", "--unsupported", "-q", "-f"}, // below 300 MB
}

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
	command, ok := mkfs[c.opts.BlockfileType]
	if !ok {
		return fmt.Errorf("lab: BlockfileType %q: want ext4 or xfs", c.opts.BlockfileType)
	}
	if out, err := exec.Command(command[0], append(command[1:], f.Name())...).CombinedOutput(); err != nil {
		return fmt.Errorf("lab: scratch file: %s: %w: %s", command[0], err, out)
	}
	return nil
}
