// SPDX-License-Identifier: Apache-2.0

package streams

import (
	"errors"
	"io"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// bufSize is what one read moves: all that a stdio pipe of the default size
// holds. A buffer is in use only while data moves.
const bufSize = 256 << 10

var buffers = sync.Pool{New: func() any { b := make([]byte, bufSize); return &b }}

// tally counts what was taken out of a pipe. Nothing is under way between the pipe
// and the count while nobody holds it.
type tally struct {
	mu sync.Mutex
	n  uint64 // guarded by mu
}

// take counts the bytes that f, which does not wait, says it has taken.
func (t *tally) take(f func() (int, error)) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n, err := f()
	t.n += uint64(max(n, 0))
	return n, err
}

// written is what was ever written into the pipe that src is the other end of.
func (t *tally) written(src syscall.Conn) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.n
	if rc, err := src.SyscallConn(); err == nil {
		_ = rc.Control(func(fd uintptr) { n += uint64(holds(fd)) }) // a closed one holds nothing
	}
	return n
}

// copyStream moves src to dst until src ends. An idle stream holds no buffer:
// one is taken only when there is something to read. A dst that fails (or nil)
// does not stop the reading, so that the process is never blocked or killed by
// a host that went away; the error is returned at the end.
func copyStream(dst io.Writer, src syscall.Conn, taken *tally) error {
	rc, err := src.SyscallConn()
	if err != nil {
		return err
	}
	if s := newSplicer(dst, rc, taken); s != nil {
		if ended, err := s.run(); ended || err != nil {
			return err
		}
	}
	var werr error
	for {
		buf, n, err := readSome(rc, taken)
		if n > 0 && dst != nil {
			if _, e := dst.Write((*buf)[:n]); e != nil {
				werr, dst = e, nil
			}
		}
		if buf != nil {
			buffers.Put(buf)
		}
		if err != nil {
			return errors.Join(err, werr)
		}
		if n == 0 {
			return werr
		}
	}
}

// readSome waits until rc is readable and reads once; n is 0 at the end. The
// caller returns buf, when there is one, to the pool.
func readSome(rc syscall.RawConn, taken *tally) (buf *[]byte, n int, err error) {
	var rerr error
	err = rc.Read(func(fd uintptr) bool {
		b := buffers.Get().(*[]byte)
		for {
			n, rerr = taken.take(func() (int, error) { return unix.Read(int(fd), *b) })
			if rerr != unix.EINTR {
				break
			}
		}
		if n > 0 {
			buf = b
			return true
		}
		buffers.Put(b)
		return rerr != unix.EAGAIN
	})
	if err != nil {
		return nil, 0, err
	}
	if rerr == unix.EIO {
		return nil, 0, nil // how a terminal's master says that nobody has it open any more
	}
	if rerr != nil {
		return nil, 0, rerr
	}
	return buf, n, nil
}
