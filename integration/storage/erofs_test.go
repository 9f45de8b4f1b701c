// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"strings"
	"testing"

	"github.com/kata-v2/kata/integration/lab"
)

// TestLayers: a pod that shares nothing has one disk with all layers and no
// virtio-fs daemon; what is written stays in the guest's memory.
func TestLayers(t *testing.T) {
	img := layered("example.com/three:latest", 3)
	img.Layers = append(busyboxLayers(t), img.Layers...)
	b := openBox(t, "erofs", lab.Options{Snapshotter: "erofs"}, img)
	b.start(img.Name, "layers")
	want(t, "content", b.shell("layers", "cat /layers/1 /layers/2 /layers/3 /top; echo; echo x >/new; cat /new"), "1233\nx")
	want(t, "disks", b.disks("layers"), "vda disk0 1")
	t.Log(b.shell("layers", "cat /proc/mounts"))
	t.Log(b.rootLog("layers"))
	for _, p := range b.processes("layers") {
		if strings.Contains(p, "virtiofsd") {
			t.Errorf("a virtio-fs daemon runs: %s", p)
		}
	}
}
