// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// becomes waits until the host's file holds something, told by its own watch.
func becomes(t *testing.T, file, want string) {
	t.Helper()
	w, err := newWatcher()
	must(t, err)
	defer w.close()
	changed := make(chan struct{}, 1)
	_, err = w.add(file, true, changed)
	must(t, err)
	limit := time.After(20 * time.Second)
	for {
		if got, err := os.ReadFile(file); err != nil || string(got) == want {
			must(t, err)
			return
		}
		select {
		case <-changed:
		case <-limit:
			got, err := os.ReadFile(file)
			t.Fatalf("the host's file holds %q, %v; want %q", got, err, want)
		}
	}
}

// A file that containers write to follows the host and the host follows it; at
// the container's end the host has all of it.
func TestWrittenFile(t *testing.T) {
	s, g := newShare(t), newCopies()
	file := write(t, t.TempDir()+"/hosts", "from the host, long")
	must(t, os.Chmod(file, 0o640))
	guest, err := s.Sync("c1", file, true, nil)
	must(t, err)
	push(t, s, "c1", g)
	other, err := s.Sync("c2", file, true, nil)
	must(t, err)
	if reader, err := s.Sync("c3", file, false, nil); err != nil || other != guest || reader == guest {
		t.Errorf("%s, another that writes %s, one that reads %s, %v", guest, other, reader, err)
	}
	push(t, s, "c2", g)
	g.write(guest, "from the guest")
	becomes(t, file, "from the guest")
	write(t, file, "back")
	g.until(t, "the host's change", func() bool { return g.data(guest) == "back" })
	g.write(guest, "x")
	becomes(t, file, "x")
	g.write(guest, "last words")
	must(t, s.Collect(context.Background(), "c1"))
	if got, err := os.ReadFile(file); err != nil || string(got) != "last words" {
		t.Errorf("after the container's end the host has %q, %v", got, err)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v; want mode 0640 as before", st.Mode(), err)
	}
	g.write(guest, strings.Repeat("x", maxWritten+1))
	if err := s.Collect(context.Background(), "c2"); err == nil { // or the call that waits has said so
		t.Log("told before")
	} else if !strings.Contains(err.Error(), "at most") {
		t.Error(err)
	}
	g.write(guest, "small again")
	becomes(t, file, "small again")
	for _, c := range []string{"c1", "c2"} {
		must(t, s.Remove(c))
	}
	g.until(t, "the removal", func() bool { return g.data(guest) == "(none)" })
	must(t, s.Collect(context.Background(), "c1"))
}

// The last word is one that both sides have, whoever wrote it.
func TestWrittenAtOnce(t *testing.T) {
	s, g := newShare(t), newCopies()
	file := write(t, t.TempDir()+"/hosts", "")
	guest, err := s.Sync("c1", file, true, nil)
	must(t, err)
	push(t, s, "c1", g)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 200 {
			write(t, file, strings.Repeat("h", i%7+1))
		}
	}()
	for i := range 200 {
		g.write(guest, strings.Repeat("g", i%5+1))
	}
	<-done
	must(t, s.Collect(context.Background(), "c1"))
	write(t, file, "the end")
	g.until(t, "the end", func() bool { return g.data(guest) == "the end" })
	must(t, s.Collect(context.Background(), "c1"))
	if got, err := os.ReadFile(file); err != nil || string(got) != g.data(guest) {
		t.Errorf("the host has %q, %v, the guest %q", got, err, g.data(guest))
	}
}

// What cannot be written back is for the share, and so is everything that is
// written when the guest does not tell.
func TestNotWritten(t *testing.T) {
	s, g := newShare(t), newCopies()
	dir := t.TempDir()
	config := dir + "/volume"
	kubelet(t, config, "1", map[string]string{"key": "x"})
	for name, path := range map[string]string{"a volume": config, "a large file": write(t, dir+"/large", strings.Repeat("x", maxWritten+1))} {
		if guest, err := s.Sync("c1", path, true, nil); !errors.Is(err, ErrNotSynced) {
			t.Errorf("%s: %q, %v", name, guest, err)
		}
	}
	_, err := s.Sync("c1", write(t, dir+"/file", "x"), true, nil)
	must(t, err)
	g.old = true
	if err := s.Push(context.Background(), "c1", g); !errdefs.IsNotImplemented(err) {
		t.Errorf("an older guest: %v", err)
	}
	s.Unsync("c1")
}
