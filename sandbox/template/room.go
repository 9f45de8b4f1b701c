// SPDX-License-Identifier: Apache-2.0

package template

import (
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// storedBytes is about twice what a template takes on disk, whatever its guest's
// memory: only what the guest has touched is stored.
const storedBytes = 192 << 20

// room tells whether the host can make and keep a template of a guest with that
// much memory. One that is filled to the last page on the way is of no use to its pods either.
func (s *Store) room(memoryBytes int64) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(s.Dir, &fs); err != nil {
		return &os.PathError{Op: "statfs", Path: s.Dir, Err: err}
	}
	available, err := availableMemory("/proc/meminfo")
	if err != nil {
		return err
	}
	return enough(s.Dir, int64(fs.Bavail)*fs.Bsize, available, memoryBytes)
}

func enough(dir string, free, available, memoryBytes int64) error {
	if free < storedBytes {
		return fmt.Errorf("%s (factory.template_path) has %d MiB free, a template needs up to %d: %w", dir, free>>20, storedBytes>>20, errdefs.ErrResourceExhausted)
	}
	// The machine that is saved, and what is stored of it on a tmpfs.
	if want := memoryBytes + storedBytes; available < want {
		return fmt.Errorf("the host has %d MiB of memory available, the making of a template needs up to %d: %w", available>>20, want>>20, errdefs.ErrResourceExhausted)
	}
	return nil
}

// availableMemory is what the kernel could give without swapping, in bytes (proc_meminfo(5), MemAvailable).
func availableMemory(meminfo string) (int64, error) {
	f, err := os.Open(meminfo)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for {
		var name, unit string
		var n int64
		if _, err := fmt.Fscanf(f, "%s %d %s\n", &name, &n, &unit); err != nil {
			return 0, fmt.Errorf("%s: no MemAvailable: %w", meminfo, err)
		}
		if name == "MemAvailable:" {
			return n << 10, nil
		}
	}
}
