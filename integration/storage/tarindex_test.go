// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kata-v2/kata/integration/lab"
)

// TestTarIndex: layers that are tar streams behind an index are read as they are by
// a guest's kernel that can; to another one the error says what is missing. It runs on containerd 2.2:
// 2.4.2 cannot look users up in such layers, for no runtime.
func TestTarIndex(t *testing.T) {
	b := openBox(t, "tarindex", lab.Options{Version: "2.2", Snapshotter: "erofs", EROFS: lab.EROFS{TarIndex: true}})
	img := onBusybox(t, layered("example.com/tarindex:latest", 2))
	b.importImage(img)
	if !newKernel(b) {
		r := b.ctr(b.runArgs(img.Name, "refused", []string{"--rm"}, "true")...)
		if r.Code == 0 || !strings.Contains(r.Stderr, "layer 0") || !strings.Contains(r.Stderr, "its blocks have 512 bytes, which needs a guest kernel of 6.4 or newer") {
			t.Errorf("got %+v; want an error that says what the kernel lacks", r)
		}
		b.remove("refused")
		return
	}
	b.start(img.Name, "tarindex")
	want(t, "files of all layers, and one that is written", b.shell("tarindex", "cat /top /layers/*; echo x >/new; cat /new"), "212x")
	want(t, "disks in the guest", b.disks("tarindex"), "disk0 1")
	if all := strings.Join(b.processes("tarindex"), "\n"); strings.Contains(all, "virtiofsd") {
		t.Errorf("a virtio-fs daemon:\n%s", all)
	}
}

// newKernel tells whether the guest's kernel is the small one, of 6.12, and not
// Debian's of 6.1.
func newKernel(b *box) bool {
	b.Helper()
	data, err := os.ReadFile(filepath.Join(os.Getenv("KATA_BUILD"), "images", "manifest.json"))
	b.must(err)
	var m struct{ Kernel struct{ Release string } }
	b.must(json.Unmarshal(data, &m))
	var major, minor int
	if _, err := fmt.Sscanf(m.Kernel.Release, "%d.%d.", &major, &minor); err != nil {
		b.Fatalf("kernel release %q: %v", m.Kernel.Release, err)
	}
	return major > 6 || major == 6 && minor >= 4
}
