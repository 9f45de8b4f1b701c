// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/kata-v2/kata/integration/lab"
)

// TestMergedLayers: layers whose metadata was merged are one filesystem on one
// disk, whatever the guest's kernel, and hide what upper ones hide.
func TestMergedLayers(t *testing.T) {
	img := layered("example.com/merged:latest", 3)
	img.Layers[2] = append(img.Layers[2], lab.File{Path: "layers/.wh.1", Mode: 0o644})
	for i := range img.Layers { // what tells the layers apart
		img.Layers[i] = append(img.Layers[i], lab.File{Path: "own", Mode: 0o644, Data: bytes.Repeat(fmt.Appendf(nil, "only in merged layer %d; ", i), 50)})
	}
	img = onBusybox(t, img)
	b := openBox(t, "plain", plain(), img)
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	b.must(b.c.MergeLayers(ctx, b.layersOf(img)))
	b.start(img.Name, "merged")
	want(t, "files of all layers, one that is hidden, and one that is written",
		b.shell("merged", "cat /top /layers/2 /layers/3; test -e /layers/1 || echo; echo x >/new; cat /new"), "323\nx")
	want(t, "disks in the guest", b.disks("merged"), "disk0 1")
	root, _, _ := strings.Cut(b.shell("merged", "cat /proc/mounts"), "\n")
	if !strings.HasPrefix(root, "overlay / overlay rw,") || strings.Contains(root, ":/run/l/") {
		t.Errorf("root: %s; want an overlay of one layer", root)
	}
	if line := b.rootLog("merged"); !strings.Contains(line, "path=block") || !strings.Contains(line, "1 layers of type erofs (merged: 4 devices), written in guest memory") {
		t.Errorf("logged: %s", line)
	}
	if all := strings.Join(b.processes("merged"), "\n"); strings.Contains(all, "virtiofsd") {
		t.Errorf("a virtio-fs daemon:\n%s", all)
	}
}

// layersOf are the files of an image's layers in the snapshotter, the topmost
// first: each is found by the largest file that only it has.
func (b *box) layersOf(img lab.Image) (layers []string) {
	b.Helper()
	files, err := b.c.LayerFiles()
	b.must(err)
	for _, content := range slices.Backward(img.Layers) {
		largest := slices.MaxFunc(content, func(x, y lab.File) int { return len(x.Data) - len(y.Data) })
		i := slices.IndexFunc(files, func(path string) bool {
			data, err := os.ReadFile(path)
			b.must(err)
			return bytes.Contains(data, largest.Data)
		})
		if i < 0 {
			b.Fatalf("no layer of %v holds %s", files, largest.Path)
		}
		layers = append(layers, files[i])
	}
	return layers
}
