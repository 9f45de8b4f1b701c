// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/sandbox/agentclient"
)

// streams are a process's, with the guest's ends in the test's hands.
type streams struct {
	agentclient.Stdio
	stdin          io.Reader
	stdout, stderr *io.PipeWriter
}

func newStreams() *streams {
	s := &streams{}
	s.stdin, s.Stdio.Stdin = pipe()
	s.Stdio.Stdout, s.stdout = io.Pipe()
	s.Stdio.Stderr, s.stderr = io.Pipe()
	return s
}

func pipe() (io.Reader, io.WriteCloser) { r, w := io.Pipe(); return r, w }

func fifos(t *testing.T) stdioPaths {
	t.Helper()
	dir := t.TempDir()
	for _, n := range []string{"in", "out", "err"} {
		must(t, unix.Mkfifo(filepath.Join(dir, n), 0o600))
	}
	return stdioPaths{stdin: dir + "/in", stdout: dir + "/out", stderr: dir + "/err"}
}

// soon bounds f.
func soon[T any](t *testing.T, what string, f func() T) T {
	t.Helper()
	ch := make(chan T, 1)
	go func() { ch <- f() }()
	select {
	case v := <-ch:
		return v
	case <-time.After(limit):
		t.Fatalf("%s hangs", what)
		panic("not reached")
	}
}

func attached(t *testing.T, paths stdioPaths, s *streams) *stdio {
	t.Helper()
	io, err := (&stdioHost{}).openStdio("c", paths)
	must(t, err)
	must(t, io.ready(bounded(t)))
	io.connect(&s.Stdio)
	t.Cleanup(io.close)
	return io
}

// client opens a pipe as containerd's client does.
func client(t *testing.T, path string, flag int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flag, 0)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func readN(t *testing.T, r io.Reader, n int) string {
	t.Helper()
	return soon(t, "read", func() string {
		b := make([]byte, n)
		n, err := io.ReadFull(r, b)
		if err != nil {
			return string(b[:n]) + " (" + err.Error() + ")"
		}
		return string(b)
	})
}

// Attaching waits for nobody, and clients may come, go and come again: no byte
// is lost in between, and nothing ends by it.
func TestClientsComeAndGo(t *testing.T) {
	paths, s := fifos(t), newStreams()
	soon(t, "attach without clients", func() *stdio { return attached(t, paths, s) })
	go func() { _, _ = s.stdout.Write([]byte("before")) }()
	out := client(t, paths.stdout, os.O_RDONLY)
	if got := readN(t, out, 6); got != "before" {
		t.Errorf("%q", got)
	}
	out.Close()
	go func() { _, _ = s.stdout.Write([]byte("between")) }()
	out = client(t, paths.stdout, os.O_RDONLY)
	if got := readN(t, out, 7); got != "between" {
		t.Errorf("%q", got)
	}
	in := client(t, paths.stdin, os.O_WRONLY)
	_, err := in.WriteString("one")
	must(t, err)
	in.Close()
	if got := readN(t, s.stdin, 3); got != "one" {
		t.Errorf("stdin %q", got)
	}
	in = client(t, paths.stdin, os.O_WRONLY) // the first client's end was not stdin's
	_, err = in.WriteString("two")
	must(t, err)
	if got := readN(t, s.stdin, 3); got != "two" {
		t.Errorf("stdin %q", got)
	}
}

// A client that comes to opening the pipes of a process that has said nothing only
// after its end finds their ends, and does not wait for a writer for ever.
func TestSilentEnd(t *testing.T) {
	paths, s := fifos(t), newStreams()
	io := attached(t, paths, s)
	must(t, s.stdout.Close())
	must(t, s.stderr.Close())
	for _, c := range io.copies {
		soon(t, "the end of the copy", func() struct{} { <-c.done.given; return struct{}{} })
	}
	for _, path := range []string{paths.stdout, paths.stderr} {
		got := soon(t, "open and read after the end", func() string {
			b, err := readAll(client(t, path, os.O_RDONLY))
			return fmt.Sprint(string(b), err)
		})
		if got != "<nil>" {
			t.Errorf("%s: %s", path, got)
		}
	}
	must(t, io.drain(bounded(t), time.Now()))

	// Nobody comes: that is no output that was cut, and delays nothing for long.
	paths, s = fifos(t), newStreams()
	io = attached(t, paths, s)
	must(t, s.stdout.Close())
	must(t, s.stderr.Close())
	must(t, io.drain(bounded(t), time.Now()))
}

// CloseIO ends stdin after the client has closed its end and all was read.
func TestCloseIO(t *testing.T) {
	for _, order := range []string{"client first", "CloseIO first"} {
		t.Run(order, func(t *testing.T) {
			paths, s := fifos(t), newStreams()
			io := attached(t, paths, s)
			in := client(t, paths.stdin, os.O_WRONLY)
			_, err := in.WriteString("last words")
			must(t, err)
			if order == "client first" {
				in.Close()
				io.closeStdin()
			} else {
				io.closeStdin()
				io.closeStdin() // again
				_, err = in.WriteString(" and more")
				must(t, err)
				in.Close()
			}
			got := soon(t, "stdin's end", func() string { b, _ := readAll(s.stdin); return string(b) })
			if want := "last words"; !strings.HasPrefix(got, want) || (order != "client first") != strings.HasSuffix(got, " and more") {
				t.Errorf("%q", got)
			}
		})
	}
}

func readAll(r io.Reader) ([]byte, error) { return io.ReadAll(r) }

// What a slow reader has not read yet stays in the pipe and the stream: the
// process is stopped, no byte is dropped.
func TestSlowReader(t *testing.T) {
	paths, s := fifos(t), newStreams()
	io := attached(t, paths, s)
	const total = 1 << 20
	wrote := make(chan int, 1)
	go func() {
		n, _ := s.stdout.Write(bytes.Repeat([]byte("z"), total))
		s.stdout.Close()
		wrote <- n
	}()
	s.stderr.Close()
	select {
	case n := <-wrote:
		t.Fatalf("%d bytes went into a pipe that nobody reads", n)
	case <-io.copies[0].done.given:
		t.Fatal("drained although nobody reads")
	case <-time.After(50 * time.Millisecond): // the test of a wait
	}
	out := client(t, paths.stdout, os.O_RDONLY)
	if got := readN(t, out, total); got != strings.Repeat("z", total) {
		t.Errorf("%d bytes", len(got))
	}
	must(t, io.drain(bounded(t), time.Now()))
	if n := <-wrote; n != total {
		t.Errorf("%d bytes written", n)
	}
	if got := soon(t, "the pipe's end", func() string { b, _ := readAll(out); return string(b) }); got != "" {
		t.Errorf("after the last byte: %q", got)
	}
}

// A grandchild that holds the output open does not hold Delete for ever.
func TestDrainIsBounded(t *testing.T) {
	paths, s := fifos(t), newStreams()
	io := attached(t, paths, s)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := io.drain(ctx, time.Now()); err == nil || !strings.Contains(err.Error(), "held open") {
		t.Errorf("%v", err)
	}
	io.close()
	soon(t, "the copies' end", func() error { return io.drain(context.Background(), time.Now()) })
	if _, err := s.stdout.Write([]byte("x")); err == nil {
		t.Error("the stream is still read after close")
	}
	io.close() // again
}

// A client that has gone for good does not hold close either.
func TestCloseWithAFullPipe(t *testing.T) {
	paths, s := fifos(t), newStreams()
	io := attached(t, paths, s)
	go func() { _, _ = s.stdout.Write(make([]byte, 1<<20)) }()
	select {
	case <-io.copies[0].done.given:
		t.Fatal("drained although nobody reads")
	case <-time.After(50 * time.Millisecond): // the pipe fills
	}
	s.stderr.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if io.drain(ctx, time.Now()) == nil {
		t.Error("drained")
	}
	io.close()
	soon(t, "the copies' end", func() error { <-io.copies[0].done.given; return nil })
}

func TestOnlyTheWantedPipes(t *testing.T) {
	paths, s := fifos(t), newStreams()
	paths.stdin, paths.stderr, paths.terminal = "", "", true
	s.Stdio.Stdin, s.Stdio.Stderr = nil, nil
	io := attached(t, paths, s)
	s.stdout.Close()
	must(t, io.drain(bounded(t), time.Now()))
	io.closeStdin()
}

func TestAttachFailures(t *testing.T) {
	for _, missing := range []string{"stdin", "stdout", "stderr"} {
		paths := fifos(t)
		path := map[string]*string{"stdin": &paths.stdin, "stdout": &paths.stdout, "stderr": &paths.stderr}[missing]
		*path = "/nonexistent/fifo"
		if _, err := (&stdioHost{}).openStdio("c", paths); !errors.Is(err, os.ErrNotExist) || !strings.HasPrefix(err.Error(), missing) {
			t.Errorf("%s: %v", missing, err)
		}
	}
}

// Output may go to a file, which is appended to.
func TestFileOutput(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	must(t, os.WriteFile(path, []byte("old "), 0o600))
	s := newStreams()
	s.Stdio.Stdin, s.Stdio.Stderr = nil, nil
	io := attached(t, stdioPaths{stdout: "file://" + path}, s)
	_, err := s.stdout.Write([]byte("new"))
	must(t, err)
	s.stdout.Close()
	must(t, io.drain(bounded(t), time.Now()))
	if got, err := os.ReadFile(path); err != nil || string(got) != "old new" {
		t.Errorf("%q, %v", got, err)
	}
}

// The log never stops the pod: what containerd does not read is dropped.
func TestLogDrops(t *testing.T) {
	t.Chdir(t.TempDir())
	if w := openLog(); w != io.Discard {
		t.Errorf("without a pipe: %T", w)
	}
	must(t, unix.Mkfifo(logFIFO, 0o600))
	w := openLog()
	line := bytes.Repeat([]byte("l"), 999)
	line = append(line, '\n')
	soon(t, "logging to a pipe that nobody reads", func() error {
		for range 1000 {
			if n, err := w.Write(line); n != len(line) || err != nil {
				t.Errorf("%d, %v", n, err)
			}
		}
		return nil
	})
	r := client(t, logFIFO, os.O_RDONLY)
	if got := readN(t, r, len(line)); got != string(line) {
		t.Errorf("the first line: %q", got)
	}
	w.(*dropWriter).f.Close()
	rest, err := readAll(r)
	must(t, err)
	for _, l := range strings.SplitAfter(string(rest), "\n") {
		if l != "" && l != string(line) {
			t.Errorf("a torn line of %d bytes", len(l))
		}
	}
}
