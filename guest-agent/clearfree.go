// SPDX-License-Identifier: Apache-2.0

package guestagent

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// What clearFree takes: so much at a time, at most so much in all, and it leaves so
// much to the kernel. In bytes.
const (
	clearStep  = 4 << 20
	clearMost  = 1 << 30
	clearSpare = 16 << 20
)

// clearFree makes the guest's free memory zero: what the boot has used and freed, the
// unpacked root image above all, would otherwise be saved with the machine and be
// copied into each that is restored with a memory of its own. The kernel clears what a process
// gets, so it is taken once and given back.
func clearFree() (err error) {
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return err
	}
	debug.FreeOSMemory()
	var taken [][]byte
	defer func() {
		for _, b := range taken {
			err = errors.Join(err, os.NewSyscallError("munmap", unix.Munmap(b)))
		}
	}()
	for len(taken) < clearMost/clearStep {
		var i unix.Sysinfo_t
		if err := unix.Sysinfo(&i); err != nil {
			return os.NewSyscallError("sysinfo", err)
		}
		if i.Freeram*uint64(i.Unit) < clearSpare+clearStep {
			return nil
		}
		b, err := unix.Mmap(-1, 0, clearStep, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
		if err != nil {
			return fmt.Errorf("%d bytes of memory: %w", clearStep, err)
		}
		taken = append(taken, b)
	}
	return nil
}
