// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/sandbox/agentclient"
)

// drainTimeout bounds how long Delete waits for output after the process has
// ended: a grandchild may hold the stream open for ever.
const drainTimeout = 5 * time.Second

// copyBuffer is the size of one copy between a stream and a pipe.
const copyBuffer = 64 << 10

var copyBuffers = sync.Pool{New: func() any { b := make([]byte, copyBuffer); return &b }}

// stdioPaths are the stdio fields of a request.
type stdioPaths struct {
	stdin, stdout, stderr string
	terminal              bool
}

func (s stdioPaths) wants() agentclient.StdioWants {
	return agentclient.StdioWants{Stdin: s.stdin != "", Stdout: s.stdout != "", Stderr: s.stderr != "" && !s.terminal}
}

// check refuses what cannot be opened, before anything is made.
func (s stdioPaths) check() error {
	for name, path := range map[string]string{"stdin": s.stdin, "stdout": s.stdout, "stderr": s.stderr} {
		if path == "" {
			continue
		}
		if _, _, err := splitScheme(path); err != nil {
			return fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// splitScheme accepts a bare path or a URI with the scheme fifo or file.
func splitScheme(s string) (scheme, path string, err error) {
	u, err := url.Parse(s)
	if err != nil {
		return "", "", err
	}
	switch u.Scheme {
	case "":
		return "fifo", s, nil
	case "fifo", "file":
		return u.Scheme, u.Path, nil
	}
	return "", "", fmt.Errorf("scheme %q of %q: must be fifo or file", u.Scheme, s)
}

// stdio copies between a process's streams and containerd's pipes. Pipes are
// held open both ways, so that a client or containerd itself can come and go.
type stdio struct {
	streams *agentclient.Stdio
	pipes   [2]*os.File    // stdout's and stderr's, nil where there is none
	output  sync.WaitGroup // the copies of stdout and stderr
	drained chan struct{}  // closed when output has ended

	mu       sync.Mutex
	stdin    *os.File // guarded by mu; our read end
	keepOpen *os.File // guarded by mu; our write end of stdin's pipe, until CloseIO
}

// attach opens the pipes and starts copying.
func attach(paths stdioPaths, streams *agentclient.Stdio) (*stdio, error) {
	s := &stdio{streams: streams, drained: make(chan struct{})}
	out, err := openOutput(paths.stdout, streams.Stdout != nil)
	if err != nil {
		return nil, fmt.Errorf("stdout: %w", err)
	}
	errf, err := openOutput(paths.stderr, streams.Stderr != nil)
	if err != nil {
		closeAll(out)
		return nil, fmt.Errorf("stderr: %w", err)
	}
	if streams.Stdin != nil {
		if err := s.openStdin(paths.stdin); err != nil {
			closeAll(out, errf)
			return nil, fmt.Errorf("stdin: %w", err)
		}
		go s.copyIn()
	}
	s.pipes = [2]*os.File{out, errf}
	s.copyOut(out, streams.Stdout)
	s.copyOut(errf, streams.Stderr)
	go func() { s.output.Wait(); close(s.drained) }()
	return s, nil
}

func closeAll(files ...*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

// openOutput opens a pipe for writing without waiting for its reader. Opened
// both ways, a write never fails for want of one: it waits.
func openOutput(uri string, wanted bool) (*os.File, error) {
	if !wanted {
		return nil, nil
	}
	scheme, path, err := splitScheme(uri)
	if err != nil {
		return nil, err
	}
	if scheme == "file" {
		return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	}
	return os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
}

func (s *stdio) openStdin(uri string) error {
	scheme, path, err := splitScheme(uri)
	if err != nil {
		return err
	}
	r, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	s.stdin = r
	if scheme == "file" {
		return nil
	}
	if s.keepOpen, err = os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0); err != nil {
		r.Close()
		return err
	}
	return nil
}

func (s *stdio) copyOut(to *os.File, from io.ReadCloser) {
	if from == nil {
		return
	}
	s.output.Add(1)
	go func() {
		defer s.output.Done()
		defer to.Close()
		defer from.Close()
		b := copyBuffers.Get().(*[]byte)
		defer copyBuffers.Put(b)
		io.CopyBuffer(onlyWriter{to}, from, *b) //nolint:errcheck // the process's end is told elsewhere
	}()
}

// onlyWriter hides ReadFrom, which would allocate a buffer of its own.
type onlyWriter struct{ io.Writer }

// copyIn ends when the pipe does, which CloseIO allows, or when the process has
// ended and close takes the read end away.
func (s *stdio) copyIn() {
	b := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(b)
	io.CopyBuffer(onlyWriter{s.streams.Stdin}, struct{ io.Reader }{s.stdin}, *b) //nolint:errcheck // the process may end first
	s.streams.Stdin.Close()
	s.mu.Lock()
	closeAll(s.stdin, s.keepOpen)
	s.mu.Unlock()
}

// closeStdin lets the process read end of file once the client has closed its
// end and everything before is read.
func (s *stdio) closeStdin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	closeAll(s.keepOpen)
}

// drain waits until all output was copied, at most drainTimeout.
func (s *stdio) drain(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	select {
	case <-s.drained:
		return nil
	case <-ctx.Done():
		return errors.New("output is still held open after the process has ended")
	}
}

// close drops what is left: what no client reads would wait in its pipe for ever.
func (s *stdio) close() {
	s.mu.Lock()
	closeAll(s.stdin, s.keepOpen)
	s.mu.Unlock()
	closeAll(s.pipes[:]...)
	s.streams.Close()
}
