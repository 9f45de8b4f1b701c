// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/integration/lab"
)

// refused: the run fails with all the words in its error.
func (b *box) refused(what string, r lab.Result, words ...string) {
	b.Helper()
	if r.Code == 0 {
		b.Errorf("%s: it ran", what)
	}
	for _, w := range words {
		if !strings.Contains(r.Stderr, w) {
			b.Errorf("%s: the error does not name %q: %s", what, w, r.Stderr)
		}
	}
}

// testRefusedInPod: a container that a machine cannot hold does not disturb the
// pod that it asks to join.
func testRefusedInPod(b *box) {
	s := member(b.T, "true")
	s.Linux.Namespaces[4].Path = "/proc/1/ns/net"
	b.refused("the host's network namespace", b.runSpec("refused", s), "linux.namespaces[4].path", "host")
	s = member(b.T, "true").mount("bind", b.TempDir(), "/x", "rbind", "rshared")
	b.refused("Bidirectional", b.runSpec("refused", s), "mounts[8].options", "rshared", "rslave")
	s = member(b.T, "true").mount("bind", "/no/such/source", "/x", "rbind")
	b.refused("missing source", b.runSpec("refused", s), "mounts[8]", "/no/such/source")
	s = member(b.T, "true")
	s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/sdz", Type: "b", Major: 8, Minor: 400}}
	b.refused("block device", b.runSpec("refused", s), "linux.devices[0]", "/dev/sdz")
	b.want(b.exec(podID, "echo", "alive"), 0, "alive\n")
}
