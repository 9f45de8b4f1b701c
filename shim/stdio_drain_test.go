// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"errors"
	"io"
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kata-v2/kata/sandbox"
)

// drained is played with drain, and returns what that said.
func drained(t *testing.T, exitedAgo time.Duration, play func(guest *io.PipeWriter, reader *io.PipeReader)) (took time.Duration, err error) {
	took = played(t, exitedAgo, play, func(s *stdio, exited time.Time) { err = s.drain(context.Background(), exited) })
	return took, err
}

// played runs a copy in a bubble of its own time and returns how long wait took.
// play is given the guest's and the reader's ends.
func played(t *testing.T, exitedAgo time.Duration, play func(guest *io.PipeWriter, reader *io.PipeReader), wait func(s *stdio, exited time.Time)) (took time.Duration) {
	synctest.Test(t, func(t *testing.T) {
		from, guest := io.Pipe()
		reader, to := io.Pipe()
		c := newOutCopy(to, from)
		s := &stdio{host: &stdioHost{}, copies: []*outCopy{c}}
		s.workers.Go(func() { _ = c.run() })
		go play(guest, reader)
		time.Sleep(exitedAgo)
		began := time.Now()
		wait(s, began.Add(-exitedAgo))
		took = time.Since(began)
		from.Close()
		reader.Close()
		s.workers.Wait()
		time.Sleep(time.Hour) // of the bubble: readers and writers notice the end
	})
	return took
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

// TestSettle: the exit waits for what the process wrote, for nothing else, and not
// for a client that does not read.
func TestSettle(t *testing.T) {
	for _, c := range []struct {
		name    string
		written uint64
		play    func(*io.PipeWriter, *io.PipeReader)
		want    time.Duration
	}{
		{"all there", 20, func(g *io.PipeWriter, r *io.PipeReader) {
			go consume(r, 10, 0)
			_, _ = g.Write(make([]byte, 20))
		}, 0},
		{"under way", 30, func(g *io.PipeWriter, r *io.PipeReader) {
			go consume(r, 10, 0)
			for range 3 {
				time.Sleep(settleQuiet - 1)
				_, _ = g.Write(make([]byte, 10))
			}
		}, 3 * (settleQuiet - 1)},
		{"a grandchild writes on", 0, func(g *io.PipeWriter, r *io.PipeReader) {
			go consume(r, 10, 0)
			for range 3 {
				time.Sleep(settleQuiet / 2)
				_, _ = g.Write(make([]byte, 10))
			}
		}, 0},
		{"a terminal ends", math.MaxUint64, func(g *io.PipeWriter, r *io.PipeReader) {
			go consume(r, 10, 0)
			time.Sleep(settleQuiet / 2)
			g.Close()
		}, settleQuiet / 2},
		{"fewer than were told", 30, func(g *io.PipeWriter, r *io.PipeReader) {
			go consume(r, 10, 0)
			_, _ = g.Write(make([]byte, 10))
			g.Close()
		}, 0},
		{"nobody reads", 20, func(g *io.PipeWriter, _ *io.PipeReader) { _, _ = g.Write(make([]byte, 20)) }, settleQuiet},
		{"a reader that is too slow", 100, func(g *io.PipeWriter, r *io.PipeReader) {
			go consume(r, 1, settleQuiet/2)
			for range 100 {
				_, _ = g.Write(make([]byte, 1))
			}
		}, settleMax},
	} {
		t.Run(c.name, func(t *testing.T) {
			took := played(t, 0, c.play, func(s *stdio, exited time.Time) {
				s.settle(sandbox.Exit{At: exited, Written: [2]uint64{c.written}})
			})
			if took != c.want {
				t.Errorf("told after %v, want %v", took, c.want)
			}
		})
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
