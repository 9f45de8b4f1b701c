// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"io"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// copyBuffer is the size of one copy between a stream and a pipe.
const copyBuffer = 128 << 10

var copyBuffers = sync.Pool{New: func() any { b := make([]byte, copyBuffer); return &b }}

// latch is given once.
type latch struct {
	once  *sync.Once
	given chan struct{}
}

func newLatch() latch { return latch{new(sync.Once), make(chan struct{})} }

func (s latch) give() { s.once.Do(func() { close(s.given) }) }

// outCopy copies one output stream.
type outCopy struct {
	to     io.WriteCloser
	from   io.ReadCloser
	stream int // 0 for stdout, 1 for stderr

	moved atomic.Int64 // bytes written to to
	limit atomic.Int64 // done is closed when so many were moved, 0 for no limit
	last  atomic.Int64 // when that was last, nanoseconds since began
	began time.Time

	done    latch        // given at the end, or at the limit
	ended   atomic.Bool  // it was the end
	awaited atomic.Int64 // settled is given when so many were moved, 0 for not asked yet
	settled latch        // given then, or at the end

	mu      sync.Mutex
	rest    *rest // guarded by mu; what the pipe still holds after the end
	dropped bool  // guarded by mu; nothing is kept any more
}

func newOutCopy(to io.WriteCloser, from io.ReadCloser) *outCopy {
	return &outCopy{to: to, from: from, began: time.Now(), done: newLatch(), settled: newLatch()}
}

// run copies until the stream ends, and returns why it could not be written on.
// The stream is closed then: the guest goes on reading what it drops, so that the
// process is not stopped by a file system that is full.
func (c *outCopy) run() error {
	b := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(b)
	defer c.finish()
	for {
		n, err := c.from.Read(*b)
		if n > 0 {
			if _, werr := c.to.Write((*b)[:n]); werr != nil {
				return werr
			}
			c.count(n)
		}
		if err != nil {
			return nil // the end; a machine's end is told elsewhere
		}
	}
}

// finish ends the copy; what the pipe holds then is kept until somebody reads it.
func (c *outCopy) finish() {
	c.from.Close()
	rest := c.close()
	c.ended.Store(true)
	c.done.give()
	c.settled.give()
	if rest != nil {
		rest.await()
	}
}

func (c *outCopy) close() *rest {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f, ok := c.to.(*os.File); ok && !c.dropped {
		c.rest = keepRest(f, c.moved.Load() == 0)
	} else {
		c.to.Close()
	}
	return c.rest
}

// kept is what the pipe still holds, nil for nothing.
func (c *outCopy) kept() *rest {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rest
}

// drop forgets what was kept, and keeps nothing any more.
func (c *outCopy) drop() {
	c.mu.Lock()
	c.dropped = true
	rest := c.rest
	c.mu.Unlock()
	if rest != nil {
		rest.drop()
	}
}

func (c *outCopy) count(n int) {
	c.last.Store(int64(time.Since(c.began)))
	moved := c.moved.Add(int64(n))
	if limit := c.limit.Load(); limit > 0 && moved >= limit {
		c.done.give()
	}
	if n := c.awaited.Load(); n > 0 && moved >= n {
		c.settled.give()
	}
}

// await is given when n bytes have been moved, or all there are. It is called once.
func (c *outCopy) await(n uint64) latch {
	c.awaited.Store(int64(min(n, math.MaxInt64)))
	if uint64(c.moved.Load()) >= n {
		c.settled.give()
	}
	return c.settled
}

// lastBytes says that only n more bytes are of interest.
func (c *outCopy) lastBytes(n int64) { c.limit.CompareAndSwap(0, c.moved.Load()+n) }

// wait returns when done or settled is given, with an error when that was not at the
// end, or when nothing has moved for as long as quiet, counted from the exit at the earliest.
func (c *outCopy) wait(ctx context.Context, s latch, exited time.Time, quiet time.Duration) error {
	timer := time.NewTimer(time.Until(c.silent(exited, quiet)))
	defer timer.Stop()
	for {
		select {
		case <-s.given:
			if !c.ended.Load() {
				return errHeldOpen
			}
			return nil
		case <-ctx.Done():
			return errHeldOpen
		case <-timer.C:
			left := time.Until(c.silent(exited, quiet))
			if left <= 0 {
				return errHeldOpen
			}
			timer.Reset(left)
		}
	}
}

// silent is when the copy will have been quiet for long enough.
func (c *outCopy) silent(exited time.Time, quiet time.Duration) time.Time {
	return laterOf(exited, c.began.Add(time.Duration(c.last.Load()))).Add(quiet)
}

// copyIn ends when the pipe does, which CloseIO allows, or when the process has
// ended: the stream fails then, or close takes the read end away.
func (s *stdio) copyIn(from *os.File, to io.WriteCloser) {
	b := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(b)
	// The wrappers hide ReadFrom and WriteTo, which would allocate buffers of their own.
	io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, *b) //nolint:errcheck // the process may end first
	to.Close()
	s.mu.Lock()
	closeAll(s.stdin, s.keepOpen)
	s.mu.Unlock()
}
