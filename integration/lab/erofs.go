// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"path/filepath"
	"strings"
)

// EROFS sets containerd's erofs snapshotter and differ up (containerd
// docs/snapshotters/erofs.md). The zero value is their default: layers made of tar
// streams, what is written in a directory of the host.
type EROFS struct {
	// UpperSize makes an ext4 of this size, such as "64MiB", of what is written.
	UpperSize string
	// TarIndex keeps layers as tar streams behind an index.
	TarIndex bool
	// MaxUnmerged is how many layers a container has before their metadata is merged
	// into one image, with the layers as its devices; 0 never merges.
	MaxUnmerged int
	// Mkfs are more options of mkfs.erofs.
	Mkfs []string
}

func (e EROFS) config() string {
	var b strings.Builder
	b.WriteString("[plugins.\"io.containerd.service.v1.diff-service\"]\n  default = [\"erofs\", \"walking\"]\n")
	b.WriteString("[plugins.\"io.containerd.snapshotter.v1.erofs\"]\n")
	if e.UpperSize != "" {
		fmt.Fprintf(&b, "  default_size = %q\n", e.UpperSize)
	}
	if e.MaxUnmerged > 0 {
		fmt.Fprintf(&b, "  max_unmerged_layers = %d\n", e.MaxUnmerged)
	}
	fmt.Fprintf(&b, "[plugins.\"io.containerd.differ.v1.erofs\"]\n  enable_tar_index = %t\n", e.TarIndex)
	if len(e.Mkfs) > 0 {
		fmt.Fprintf(&b, "  mkfs_options = [%s]\n", quoted(e.Mkfs))
	}
	return b.String()
}

// LayerFiles are the erofs snapshotter's layers, in the order of its numbers.
func (c *Containerd) LayerFiles() ([]string, error) {
	found, err := filepath.Glob(filepath.Join(c.rootDir(), "io.containerd.snapshotter.v1.erofs", "snapshots", "*", "layer.erofs"))
	if err != nil {
		return nil, fmt.Errorf("lab: layers: %w", err)
	}
	return found, nil
}
