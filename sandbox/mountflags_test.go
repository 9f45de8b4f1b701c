// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"slices"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestKeepFlags: a bind mount has its source's flags, unless it says otherwise.
func TestKeepFlags(t *testing.T) {
	flags := func(path string) int64 {
		return map[string]int64{"/strict": unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "/nosuid": unix.MS_NOSUID}[path]
	}
	spec := &specs.Spec{Mounts: []specs.Mount{
		{Destination: "/a", Type: "bind", Source: "/strict", Options: []string{"rbind", "ro"}},
		{Destination: "/b", Type: "bind", Source: "/strict", Options: []string{"exec", "nodev"}},
		{Destination: "/dev/shm", Type: "bind", Source: "/nosuid"},
		{Destination: "/c", Type: "bind", Source: "/plain"},
		{Destination: "/d", Type: "tmpfs", Source: "/strict"},
	}}
	got := keepFlags(spec, flags)
	for i, want := range [][]string{{"rbind", "ro", "nosuid", "nodev", "noexec"}, {"exec", "nodev", "nosuid"}, {"nosuid"}, nil, nil} {
		if m := got.Mounts[i]; !slices.Equal(m.Options, want) {
			t.Errorf("%s: %q; want %q", m.Destination, m.Options, want)
		}
	}
	if len(spec.Mounts[0].Options) != 2 {
		t.Error("the specification was changed")
	}
}
