// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// lastWords copies text into a named pipe that nobody reads and returns the pipe's
// path once the stream has ended.
func lastWords(t *testing.T, text string) (*stdio, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "stdout")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	to, err := openOutput(target{scheme: schemeFIFO, path: path})
	if err != nil {
		t.Fatal(err)
	}
	from, guest := io.Pipe()
	c := newOutCopy(to, from)
	s := &stdio{host: &stdioHost{}, copies: []*outCopy{c}, out: [2]*os.File{to}}
	s.workers.Go(func() { _ = c.run() })
	if _, err := io.WriteString(guest, text); err != nil {
		t.Fatal(err)
	}
	guest.Close()
	<-c.done.given
	return s, path
}

// TestLastWords: what a process wrote while nobody read is there for the one who
// comes after its end, and so is the end.
func TestLastWords(t *testing.T) {
	s, path := lastWords(t, "last words\n")
	// Late: after all other bounds, as a containerd that was down for long.
	drained := make(chan error, 1)
	f, err := os.Open(path) // would wait for ever without a writer
	if err != nil {
		t.Fatal(err)
	}
	go func() { drained <- s.drain(context.Background(), time.Now().Add(-time.Hour)); s.close() }()
	got, err := io.ReadAll(f)
	if string(got) != "last words\n" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	if err := <-drained; err != nil {
		t.Errorf("drain: %v", err)
	}
	s.close()
}

// TestNobodyReads: without a reader the end comes all the same.
func TestNobodyReads(t *testing.T) {
	s, path := lastWords(t, "last words\n")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.drain(ctx, time.Now()); err == nil {
		t.Errorf("drain: %v", err)
	}
	s.close()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	// Nothing was written: nothing is missing.
	s, _ = lastWords(t, "")
	if err := s.drain(context.Background(), time.Now()); err != nil {
		t.Errorf("drain: %v", err)
	}
	s.close()
}

// TestDropRacesWithTheEnd: the pipes may be dropped at any moment of a stream's end.
func TestDropRacesWithTheEnd(t *testing.T) {
	for i := range 200 {
		path := filepath.Join(t.TempDir(), "stdout")
		if err := unix.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
		to, err := openOutput(target{scheme: schemeFIFO, path: path})
		if err != nil {
			t.Fatal(err)
		}
		from, guest := io.Pipe()
		c := newOutCopy(to, from)
		s := &stdio{host: &stdioHost{}, copies: []*outCopy{c}, out: [2]*os.File{to}}
		s.workers.Go(func() { _ = c.run() })
		if i%2 == 0 {
			if _, err := io.WriteString(guest, "x"); err != nil {
				t.Fatal(err)
			}
		}
		go guest.Close()
		s.close()
		guest.Close()
	}
}
