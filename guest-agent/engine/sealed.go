// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// seals are those that crun looks for on its own program (libcrun/cloned_binary.c):
// with exactly these it runs where it is.
const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// sealed is a copy in memory of the program at path, which nobody can write any
// more, not through /proc/<pid>/exe either (CVE-2019-5736). A program that does not
// find itself sealed so makes such a copy of itself at every call; a read-only bind
// mount does instead only where the file system knows no seals, and tmpfs, which the
// guest's root is, knows them. One copy for all calls also keeps its pages, so that an
// emulator that has translated them need not do so at every call.
//
// It lasts as long as the file is open.
func sealed(path string) (*os.File, error) {
	from, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("OCI engine: %w", err)
	}
	defer from.Close()
	fd, err := unix.MemfdCreate("oci-engine", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3, where every memfd is executable
		fd, err = unix.MemfdCreate("oci-engine", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("OCI engine %s: memory for it: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), "oci-engine")
	if _, err = io.Copy(f, from); err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("OCI engine %s: copy into memory: %w", path, err)
	}
	return f, nil
}

// program tells how to execute the sealed copy of the program at path, which the
// first call makes. The name is one of this process and of what it has just forked,
// and means the copy as long as the function is in use: it holds the file.
func program(path string) func() (string, error) {
	copied := sync.OnceValues(func() (*os.File, error) { return sealed(path) })
	return func() (string, error) {
		f, err := copied()
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("/proc/self/fd/%d", f.Fd()), nil
	}
}
