// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/hypervisor"
)

// TestPlace: a disk's file without a name gets that of the snapshot's, with its
// owner and mode; what cannot be done leaves the snapshot's.
func TestPlace(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "kata-place-") // a file system with files that never had a name
	must(t, err)
	defer os.RemoveAll(dir)
	nameless, err := os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o600)
	must(t, err)
	defer nameless.Close()
	_, err = nameless.WriteString("saved")
	must(t, err)
	named, err := os.Open(writeBytes(t, filepath.Join(dir, "named"), []byte("other")))
	must(t, err)
	defer named.Close()
	must(t, os.Remove(named.Name()))
	snapshot := filepath.Join(dir, "rwlayer.img")
	writeBytes(t, snapshot, []byte("empty"))
	must(t, os.Chmod(snapshot, 0o640))
	must(t, os.Chown(snapshot, 3, 4))

	d := NewDisks()
	d.Keep()
	defer d.LetGo()
	disk := func(id string, f *os.File) Kept {
		return Kept{Disk: hypervisor.Disk{ID: id, Parts: []hypervisor.DiskPart{{File: f}}}}
	}
	d.Restore([]Kept{disk("disk0", nameless), disk("disk1", named)})
	for name, c := range map[string]struct {
		id, path string
		is       func(error) bool
	}{
		"a disk that is not there": {"disk7", snapshot, errdefs.IsNotFound},
		"no snapshot":              {"disk0", filepath.Join(dir, "none"), errdefs.IsNotFound},
		"a directory":              {"disk0", dir, errdefs.IsFailedPrecondition},
		"a file that had a name":   {"disk1", snapshot, func(err error) bool { return strings.Contains(err.Error(), "link") }},
	} {
		if err := d.Place(c.id, c.path); err == nil || !c.is(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	has := func(want string) {
		t.Helper()
		got, err := os.ReadFile(snapshot)
		all, _ := os.ReadDir(dir)
		if err != nil || string(got) != want || len(all) != 1 {
			t.Fatalf("the snapshot holds %q, %v, beside %d files; want %q", got, err, len(all)-1, want)
		}
	}
	has("empty")
	must(t, d.Place("disk0", snapshot))
	has("saved")
	_, err = nameless.WriteString(", and more")
	must(t, err)
	must(t, d.Place("disk0", snapshot)) // it is the same file
	has("saved, and more")
	var st unix.Stat_t
	must(t, unix.Stat(snapshot, &st))
	if st.Uid != 3 || st.Gid != 4 || st.Mode&0o7777 != 0o640 {
		t.Errorf("owner %d:%d, mode %o", st.Uid, st.Gid, st.Mode)
	}
}
