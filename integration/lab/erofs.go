// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
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
	fmt.Fprintf(&b, "[plugins.\"io.containerd.differ.v1.erofs\"]\n  enable_tar_index = %t\n", e.TarIndex)
	if len(e.Mkfs) > 0 {
		fmt.Fprintf(&b, "  mkfs_options = [%s]\n", quoted(e.Mkfs))
	}
	return b.String()
}

// MergeLayers merges the metadata of an image's layers, the topmost first, into
// one EROFS that has them as its devices, where the snapshotter of containerd 2.3
// and newer looks for it: beside the topmost one. containerd itself (2.4.2) only
// reads such files.
func (c *Containerd) MergeLayers(ctx context.Context, layers []string) error {
	base, err := Dir()
	if err != nil {
		return err
	}
	args := []string{"--quiet", "--aufs", "--ovlfs-strip=1", filepath.Join(filepath.Dir(layers[0]), "fsmeta.erofs")}
	for _, l := range slices.Backward(layers) {
		args = append(args, l)
	}
	if out, err := exec.CommandContext(ctx, filepath.Join(base, "erofs", "mkfs.erofs"), args...).CombinedOutput(); err != nil {
		return fmt.Errorf("lab: merge layers: %w: %s", err, out)
	}
	return nil
}

// LayerFiles are the erofs snapshotter's layers, in the order of its numbers.
func (c *Containerd) LayerFiles() ([]string, error) {
	return c.snapshotFiles("layer.erofs")
}

// UpperFiles are the files with what containers write, in the same order.
func (c *Containerd) UpperFiles() ([]string, error) {
	return c.snapshotFiles("rwlayer.img")
}

func (c *Containerd) snapshotFiles(name string) ([]string, error) {
	found, err := filepath.Glob(filepath.Join(c.rootDir(), "io.containerd.snapshotter.v1.erofs", "snapshots", "*", name))
	if err != nil {
		return nil, fmt.Errorf("lab: %s: %w", name, err)
	}
	return found, nil
}
