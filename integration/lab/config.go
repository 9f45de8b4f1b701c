// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"strings"
)

// release describes how one containerd release line is configured.
type release struct {
	// dir is the release's folder below Dir.
	dir string
	// configVersion is the newest config.toml version that the release reads.
	configVersion int
	// cri are the plugins that only Kubernetes needs; they cost start-up time.
	cri []string
	// snapshotters are the plugin ids of the snapshotters kept on.
	extra string
}

// releases maps Options.Version to what is known about it. The plugin ids are
// those that `containerd config default` prints.
var releases = map[string]release{
	"1.6": {
		dir: "containerd-1.6", configVersion: 2,
		cri: []string{"io.containerd.grpc.v1.cri"},
	},
	"2.4": {
		dir: "containerd-2.4", configVersion: 3,
		cri: []string{
			"io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
			"io.containerd.grpc.v1.cri", "io.containerd.podsandbox.controller.v1.podsandbox",
		},
		extra: "imports = []\n",
	},
}

// alwaysOff are plugins that would touch the machine outside the lab's own
// directories: /opt/containerd, /var/run/nri.
var alwaysOff = map[string][]string{
	"1.6": {"io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper"},
	"2.4": {"io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri", "io.containerd.image-verifier.v1.bindir"},
}

// config is the daemon's config.toml.
func (c *Containerd) config() string {
	r := releases[c.opts.Version]
	off := append([]string(nil), alwaysOff[c.opts.Version]...)
	if !c.opts.CRI {
		off = append(off, r.cri...)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "version = %d\n", r.configVersion)
	fmt.Fprintf(&b, "root = %q\nstate = %q\n", c.rootDir(), c.stateDir())
	fmt.Fprintf(&b, "disabled_plugins = [%s]\n", quoted(off))
	b.WriteString(r.extra)
	fmt.Fprintf(&b, "[grpc]\n  address = %q\n", c.Address)
	b.WriteString("[debug]\n  level = \"debug\"\n")
	b.WriteString(c.opts.ExtraConfig)
	return b.String()
}

func quoted(list []string) string {
	q := make([]string, len(list))
	for i, s := range list {
		q[i] = fmt.Sprintf("%q", s)
	}
	return strings.Join(q, ", ")
}
