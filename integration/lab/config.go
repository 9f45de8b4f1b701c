// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// release describes how one containerd release line is configured.
type release struct {
	// dir is the release's folder below Dir.
	dir string
	// configVersion is the newest config.toml version that the release reads.
	configVersion int
	// off are plugins that would touch the machine outside the lab's own
	// directories (/opt/containerd, /var/run/nri), or look for what is not there.
	off []string
	// cri are the plugins that only Kubernetes needs; they cost start-up time.
	cri []string
	// criDir is the folder of a build with them, where the one in dir has none. Only
	// `make test-all` sets it up.
	criDir string
	// criNeeds are those of off that the CRI does not load without.
	criNeeds []string
	// extra is more of config.toml.
	extra string
}

// off2 are the plugins that no lab of containerd 2 wants.
var off2 = []string{"io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri", "io.containerd.image-verifier.v1.bindir"}

// releases maps Options.Version to what is known about it. The plugin ids are
// those that `containerd config default` prints.
var releases = map[string]release{
	"1.6": {
		dir: "containerd-1.6", configVersion: 2,
		off: []string{
			"io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
			"io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper",
		},
		cri: []string{"io.containerd.grpc.v1.cri"},
	},
	"1.7": {
		dir: "containerd-1.7", configVersion: 2,
		off:    []string{"io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri"},
		criDir: "containerd-1.7-cri",
	},
	"2.2": {
		dir: "containerd-2.2", configVersion: 3, off: off2, extra: "imports = []\n",
		criDir: "containerd-2.2-cri", criNeeds: []string{"io.containerd.image-verifier.v1.bindir"},
	},
	"2.4": {
		dir: "containerd-2.4", configVersion: 3, off: off2,
		cri: []string{
			"io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
			"io.containerd.grpc.v1.cri", "io.containerd.podsandbox.controller.v1.podsandbox",
		},
		extra: "imports = []\n",
	},
}

// Versions are the release lines that there are, oldest first.
func Versions() []string { return slices.Sorted(maps.Keys(releases)) }

// config is the daemon's config.toml.
func (c *Containerd) config() string {
	r := releases[c.opts.Version]
	off := slices.Clone(r.off)
	if !c.opts.CRI {
		off = append(off, r.cri...) // none in a build that leaves them out
	} else {
		off = slices.DeleteFunc(off, func(plugin string) bool { return slices.Contains(r.criNeeds, plugin) })
	}
	var b strings.Builder
	fmt.Fprintf(&b, "version = %d\n", r.configVersion)
	fmt.Fprintf(&b, "root = %q\nstate = %q\n", c.rootDir(), c.stateDir())
	fmt.Fprintf(&b, "disabled_plugins = [%s]\n", quoted(off))
	b.WriteString(r.extra)
	fmt.Fprintf(&b, "[grpc]\n  address = %q\n", c.Address)
	fmt.Fprintf(&b, "[debug]\n  level = %q\n", c.opts.LogLevel)
	if c.opts.CRI {
		b.WriteString(c.criConfig())
	}
	if c.opts.Snapshotter == "erofs" {
		b.WriteString(c.opts.EROFS.config())
	}
	if c.opts.Snapshotter == "blockfile" {
		fmt.Fprintf(&b, "[plugins.\"io.containerd.snapshotter.v1.blockfile\"]\n  scratch_file = %q\n  fs_type = %q\n", c.scratchFile(), c.opts.BlockfileType)
	}
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
