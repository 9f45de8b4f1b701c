// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// keptFlags are the flags of a file system that a bind mount of it keeps on the
// host, with their words for on and off (statfs(2), whose bits are those of mount(2)).
var keptFlags = []struct {
	bit     int64
	on, off string
}{{unix.MS_NOSUID, "nosuid", "suid"}, {unix.MS_NODEV, "nodev", "dev"}, {unix.MS_NOEXEC, "noexec", "exec"}}

// keepFlags is a copy of spec in which the bind mounts of the host say by their options what
// the host's mounts would have said by themselves: in the guest the source is
// another file system. What a mount says itself stays.
func keepFlags(spec *specs.Spec, flags func(path string) int64) *specs.Spec {
	out := *spec
	out.Mounts = slices.Clone(spec.Mounts)
	for i, m := range out.Mounts {
		if planMount(m) == mountInGuest {
			continue
		}
		has := flags(m.Source)
		for _, f := range keptFlags {
			if has&f.bit != 0 && !slices.Contains(m.Options, f.on) && !slices.Contains(m.Options, f.off) {
				out.Mounts[i].Options = append(slices.Clone(out.Mounts[i].Options), f.on)
			}
		}
	}
	return &out
}
