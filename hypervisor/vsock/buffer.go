// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"math/bits"
	"sync"
)

const (
	minBuffer = 4 << 10   // first allocation of a stream's receive buffer
	maxBuffer = 256 << 10 // the most a stream is granted; Linux's own default
)

// pools keep emptied buffers by size class, so that a stream that fills and
// drains its buffer all the time leaves no garbage.
var pools [7]sync.Pool // minBuffer<<i

func classOf(size int) int { return bits.Len(uint(size/minBuffer)) - 1 }

func takeBuffer(size int) []byte {
	if b, ok := pools[classOf(size)].Get().(*[]byte); ok {
		return *b
	}
	return make([]byte, size)
}

func giveBuffer(b []byte) {
	if b != nil {
		pools[classOf(len(b))].Put(&b)
	}
}

// buffer is a ring of bytes that grows in powers of two up to maxBuffer and
// holds no memory while it is empty.
type buffer struct {
	b    []byte
	r, n int // index of the first byte, number of bytes
}

// reserve makes room for n more bytes; the caller has checked that they are granted.
func (b *buffer) reserve(n int) {
	if b.n+n <= len(b.b) {
		return
	}
	size := max(minBuffer, len(b.b))
	for size < b.n+n {
		size *= 2
	}
	nb := takeBuffer(size)
	kept := b.n
	b.peek(nb)
	giveBuffer(b.b)
	b.b, b.r, b.n = nb, 0, kept
}

// fill appends n bytes of s from offset off on.
func (b *buffer) fill(s segments, off uint64, n int) {
	b.reserve(n)
	w := (b.r + b.n) % len(b.b)
	first := min(n, len(b.b)-w)
	s.copyOut(b.b[w:w+first], off)
	s.copyOut(b.b[:n-first], off+uint64(first))
	b.n += n
}

// peek copies what is held into p without taking it.
func (b *buffer) peek(p []byte) int {
	n := min(len(p), b.n)
	if n > 0 {
		first := copy(p[:n], b.b[b.r:min(len(b.b), b.r+n)])
		copy(p[first:n], b.b)
	}
	return n
}

// take moves bytes into p.
func (b *buffer) take(p []byte) int {
	n := b.peek(p)
	if b.n -= n; b.n == 0 {
		b.drop()
	} else {
		b.r = (b.r + n) % len(b.b)
	}
	return n
}

// drop forgets everything and gives the memory back.
func (b *buffer) drop() {
	giveBuffer(b.b)
	*b = buffer{}
}
