// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"
)

// drained runs a copy in a bubble of its own time and returns how long drain
// took and what it said. play is given the guest's and the reader's ends.
func drained(t *testing.T, exitedAgo time.Duration, play func(guest *io.PipeWriter, reader *io.PipeReader)) (took time.Duration, err error) {
	synctest.Test(t, func(t *testing.T) {
		from, guest := io.Pipe()
		reader, to := io.Pipe()
		c := newOutCopy(to, from)
		s := &stdio{host: &stdioHost{}, copies: []*outCopy{c}}
		s.workers.Go(func() { _ = c.run() })
		go play(guest, reader)
		time.Sleep(exitedAgo)
		began := time.Now()
		err = s.drain(context.Background(), began.Add(-exitedAgo))
		took = time.Since(began)
		from.Close()
		reader.Close()
		s.workers.Wait()
		time.Sleep(time.Hour) // of the bubble: readers and writers notice the end
	})
	return took, err
}

// consume takes size bytes at a time with a pause before each, until the end.
func consume(r io.Reader, size int, pause time.Duration) {
	b := make([]byte, size)
	for {
		time.Sleep(pause)
		if _, err := r.Read(b); err != nil {
			return
		}
	}
}

func TestDrain(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		name      string
		exitedAgo time.Duration
		play      func(*io.PipeWriter, *io.PipeReader)
		most      time.Duration
		held      bool
	}{
		{"the end comes", 0, func(g *io.PipeWriter, r *io.PipeReader) {
			go consume(r, mib, 0)
			_, _ = g.Write(make([]byte, mib))
			g.Close()
		}, 0, false},
		{"held open and quiet", 0, func(g *io.PipeWriter, r *io.PipeReader) { go consume(r, mib, 0); _, _ = g.Write([]byte("x")) }, drainQuiet, true},
		{"held open and quiet since long ago", time.Minute, func(g *io.PipeWriter, r *io.PipeReader) { go consume(r, mib, 0); _, _ = g.Write([]byte("x")) }, 0, true},
		{"nobody reads", 0, func(g *io.PipeWriter, _ *io.PipeReader) { _, _ = g.Write(make([]byte, mib)) }, drainQuiet, true},
		// Slower than drainQuiet would allow for all of it, but it goes on.
		{"a slow reader", 0, func(g *io.PipeWriter, r *io.PipeReader) {
			go consume(r, copyBuffer, time.Second)
			_, _ = g.Write(make([]byte, mib))
			g.Close()
		}, 10 * time.Second, false},
		{"a reader that is too slow", 0, func(g *io.PipeWriter, r *io.PipeReader) {
			go consume(r, copyBuffer/8, 4*time.Second)
			_, _ = g.Write(make([]byte, mib))
		}, drainMax, true},
		// A grandchild that never stops: what was under way at the exit has passed long before drainMax.
		{"endless output", 0, func(g *io.PipeWriter, r *io.PipeReader) {
			go consume(r, mib, 100*time.Millisecond)
			for {
				if _, err := g.Write(make([]byte, copyBuffer)); err != nil {
					return
				}
			}
		}, drainQuiet, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			took, err := drained(t, c.exitedAgo, c.play)
			if held := errors.Is(err, errHeldOpen); held != c.held || (err != nil) != c.held || took > c.most {
				t.Errorf("after %v: %v; want held open %v after at most %v", took, err, c.held, c.most)
			}
		})
	}
}
