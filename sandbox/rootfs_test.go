// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/sandbox/storage"
)

// A root filesystem that cannot be is named by its layer, and leaves a running pod
// as it was.
func TestBadRoot(t *testing.T) {
	p := newPod(t)
	keep := p.start("keep", "sleep")
	text := filepath.Join(t.TempDir(), "text")
	must(t, os.WriteFile(text, make([]byte, 8192), 0o600))
	for source, is := range map[string]func(error) bool{
		"/nonexistent/layer": errdefs.IsNotFound, text: errdefs.IsInvalidArgument, "/dev/null": errdefs.IsInvalidArgument,
	} {
		calls := len(p.agent.Calls())
		cc := p.container("c1", "sleep")
		cc.Rootfs = []storage.Mount{{Type: "erofs", Source: source, Options: []string{"ro"}}}
		if _, err := p.CreateContainer(bounded(t), cc); !is(err) || !strings.Contains(err.Error(), "rootfs layer 0 ("+source+")") {
			t.Errorf("%s: %v", source, err)
		}
		if p.disks.Attached() > 0 || len(p.agent.Calls()) != calls || keep.Init().State() != Running {
			t.Errorf("%s: %d disks are attached, the guest was asked for %q, the other container is %s",
				source, p.disks.Attached(), p.agent.Calls()[calls:], keep.Init().State())
		}
	}
}
