// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// rest is a named pipe whose writer has ended and that nobody may be there to read:
// containerd is down, perhaps, or has not come to opening it. A pipe forgets what is
// in it with its last descriptor, and without a writer a reader's open waits for
// ever, so one stays open until there is a reader, who then reads all and the end
// (fifo(7): an open for writing waits for a reader, which is how we learn of one).
type rest struct {
	taken chan struct{} // closed when there is a reader, or after drop
	empty bool          // there is nothing in it but its end

	mu   sync.Mutex // held while descriptors are opened and closed
	w    *os.File   // guarded by mu
	path string     // the pipe by the number of w: the client may have removed its name
}

// keepRest makes a rest of f, a pipe that is open both ways, and closes f. It
// returns nil when there is nothing to be kept: what was read had a reader, so a
// pipe that is empty is kept only when it is silent, nothing was ever written to it.
func keepRest(f *os.File, silent bool) *rest {
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || fi.Mode()&os.ModeNamedPipe == 0 {
		return nil
	}
	rc, err := f.SyscallConn()
	if err != nil {
		return nil
	}
	var r *rest
	_ = rc.Control(func(fd uintptr) {
		n, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ)
		if err != nil || n == 0 && !silent {
			return
		}
		w, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_WRONLY|unix.O_NONBLOCK, 0)
		if err == nil {
			r = &rest{taken: make(chan struct{}), empty: n == 0, w: w, path: fmt.Sprintf("/proc/self/fd/%d", w.Fd())}
		}
	})
	return r
}

// await returns when the pipe has a reader or was dropped. It takes a thread that long.
func (r *rest) await() {
	fd, err := unix.Open(r.path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	for err == unix.EINTR {
		fd, err = unix.Open(r.path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	}
	if err == nil {
		unix.Close(fd)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.w.Close()
	close(r.taken)
}

// drop forgets what nobody has taken.
func (r *rest) drop() {
	r.mu.Lock()
	select {
	case <-r.taken:
		r.mu.Unlock()
		return
	default:
	}
	// We are the reader that await waits for.
	fd, err := unix.Open(r.path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	r.mu.Unlock()
	if err == nil {
		<-r.taken
		unix.Close(fd)
	}
}
