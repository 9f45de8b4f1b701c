// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"log/slog"
	"path/filepath"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestHostDisks: what a privileged container lists of the host's disks is left
// out, a volume stays, and so does what an ordinary container names.
func TestHostDisks(t *testing.T) {
	node := filepath.Join(t.TempDir(), "disk")
	if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(240, 7))); err != nil { // for local use (devices.txt)
		t.Fatal(err)
	}
	s := &Sandbox{o: Options{Log: slog.New(slog.DiscardHandler)}}
	number := int64(240)
	all := specs.LinuxDeviceCgroup{Allow: true, Access: "rwm"}
	one := specs.LinuxDeviceCgroup{Allow: true, Type: "b", Major: &number, Access: "rwm"}
	for name, c := range map[string]struct {
		rule specs.LinuxDeviceCgroup
		path string
		kept int
	}{
		"host's disk":             {all, node, 1},
		"volume":                  {all, "/dev/xvda", 2},
		"not privileged":          {one, node, 2},
		"other number":            {all, filepath.Dir(node), 2},
		"all types, by that word": {specs.LinuxDeviceCgroup{Allow: true, Type: "a", Access: "rwm"}, node, 1},
	} {
		t.Run(name, func(t *testing.T) {
			spec := &specs.Spec{Linux: &specs.Linux{
				Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Access: "rwm"}, c.rule}},
				Devices:   []specs.LinuxDevice{{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}, {Path: c.path, Type: "b", Major: 240, Minor: 7}},
			}}
			got := s.withoutHostDisks("c", spec)
			if n := len(got.Linux.Devices); n != c.kept {
				t.Errorf("%d devices are kept: %v; want %d", n, got.Linux.Devices, c.kept)
			}
			if len(spec.Linux.Devices) != 2 {
				t.Error("the caller's specification was changed")
			}
		})
	}
}
