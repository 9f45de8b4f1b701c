// SPDX-License-Identifier: Apache-2.0

// Package tail keeps the last bytes of a stream, for error messages.
package tail

import (
	"strings"
	"sync"
)

// Buffer is an io.Writer that keeps the last Max bytes written to it. It is
// safe for concurrent use.
type Buffer struct {
	max int

	mu  sync.Mutex
	buf []byte // guarded by mu; at most 2*max long
}

// New returns a Buffer that keeps max bytes.
func New(max int) *Buffer { return &Buffer{max: max} }

// Write never fails.
func (b *Buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := len(p)
	if n > b.max {
		p = p[n-b.max:]
	}
	if len(b.buf)+len(p) > 2*b.max {
		b.buf = append(b.buf[:0], b.buf[len(b.buf)-b.max:]...)
	}
	b.buf = append(b.buf, p...)
	return n, nil
}

// String returns what is kept, without trailing white space. Carriage returns
// and other control characters, which a hostile guest may send to a terminal,
// are taken out, except newline and tab.
func (b *Buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.buf
	if len(p) > b.max {
		p = p[len(p)-b.max:]
	}
	s := strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || (r >= 0x20 && r != 0x7f) {
			return r
		}
		return -1
	}, strings.ToValidUTF8(string(p), "?"))
	return strings.TrimSpace(s)
}
