// SPDX-License-Identifier: Apache-2.0

// Package relay joins two connections.
package relay

import (
	"context"
	"io"
)

// halfCloser is a connection that can end its outgoing direction alone.
type halfCloser interface{ CloseWrite() error }

// Join moves bytes between a and b, both ways, until both directions have ended.
// The end of one is passed on by half-closing the other connection, when that can
// be; a failure of one direction, and ctx, end both. A side that does not read
// stops the other from being read. It closes both connections.
func Join(ctx context.Context, a, b io.ReadWriteCloser) {
	shut := func() {
		a.Close()
		b.Close()
	}
	defer shut()
	defer context.AfterFunc(ctx, shut)()
	back := make(chan struct{})
	go func() {
		defer close(back)
		move(a, b, shut)
	}()
	move(b, a, shut)
	<-back
}

// move is one direction.
func move(dst, src io.ReadWriteCloser, shut func()) {
	_, err := io.Copy(dst, src)
	if h, ok := dst.(halfCloser); ok && err == nil {
		err = h.CloseWrite()
	} else if err == nil {
		err = io.ErrClosedPipe // there is no way to say that only this direction ended
	}
	if err != nil {
		shut()
	}
}
