// SPDX-License-Identifier: Apache-2.0

package streams

import (
	"io"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// spliceSize bounds what one call moves: more than a pipe holds.
const spliceSize = 1 << 20

// splicer moves a pipe's pages into a socket within the kernel. It saves a copy of
// each byte, and the buffer.
type splicer struct {
	dst, src syscall.RawConn
	taken    *tally
	move     func(from, to uintptr) (int, error) // splice(2), or a test's
}

// newSplicer is nil when dst is no socket of the kernel's, or splice(2) would be
// no better than a copy.
func newSplicer(dst io.Writer, src syscall.RawConn, taken *tally) *splicer {
	c, ok := dst.(syscall.Conn)
	if !ok || !spliceable() {
		return nil
	}
	rc, err := c.SyscallConn()
	if err != nil {
		return nil
	}
	return &splicer{dst: rc, src: src, taken: taken, move: splice}
}

// run moves everything until src ends. An error is src's. ended is false without
// one when the kernel refuses to splice these two, or dst has failed: what follows
// is to be copied, which finds out which of both it is.
func (s *splicer) run() (ended bool, err error) {
	for {
		n, err, refused := s.some()
		if err != nil || refused != nil {
			return false, err
		}
		if n == 0 {
			return true, nil
		}
	}
}

// some waits until there is something to move and room for it; n is 0 at the end of src.
func (s *splicer) some() (n int, err, refused error) {
	full := false
	err = s.src.Read(func(from uintptr) bool {
		if cerr := s.dst.Control(func(to uintptr) { n, refused = s.try(from, to) }); cerr != nil {
			refused = cerr
		}
		if refused != unix.EAGAIN {
			return true
		}
		// Either side may be the reason. When something has come since, the second
		// try below moves it.
		full = holds(from) > 0
		return full
	})
	if err != nil || !full {
		return n, err, refused
	}
	// Nobody else reads src, so from here on only dst can make it wait. src is held
	// for each try alone: closing it must not wait for the host.
	werr := s.dst.Write(func(to uintptr) bool {
		err = s.src.Control(func(from uintptr) { n, refused = s.try(from, to) })
		return err != nil || refused != unix.EAGAIN
	})
	if werr != nil {
		refused = werr
	}
	return n, err, refused
}

func (s *splicer) try(from, to uintptr) (int, error) {
	return s.taken.take(func() (int, error) { return s.move(from, to) })
}

// holds tells how many bytes are in a pipe.
func holds(fd uintptr) int {
	n, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ)
	if err != nil {
		return 0
	}
	return n
}

func splice(from, to uintptr) (int, error) {
	for {
		n, err := unix.Splice(int(from), nil, int(to), nil, spliceSize, unix.SPLICE_F_NONBLOCK)
		if err != unix.EINTR {
			return int(max(n, 0)), err
		}
	}
}

// spliceable says that the kernel hands a socket up to 16 pages of a pipe at a
// time (Linux 6.5, splice_to_socket). Older ones hand over one, each a packet of its own.
var spliceable = sync.OnceValue(func() bool {
	var u unix.Utsname
	return unix.Uname(&u) == nil && atLeast(unix.ByteSliceToString(u.Release[:]), 6, 5)
})

// atLeast compares the first two numbers of a kernel's release.
func atLeast(release string, major, minor int) bool {
	parts := strings.SplitN(release, ".", 3)
	if len(parts) < 3 {
		return false
	}
	a, aerr := strconv.Atoi(parts[0])
	b, berr := strconv.Atoi(parts[1])
	return aerr == nil && berr == nil && (a > major || a == major && b >= minor)
}
