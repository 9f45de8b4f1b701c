// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/sandbox/agentclient"
)

// Schemes of a stream's address (containerd docs/runtime-v2.md, "Logging"). A
// path without one is a named pipe that the client made.
const (
	schemeFIFO   = "fifo"
	schemeFile   = "file"
	schemeBinary = "binary"
)

// target is where a stream leads; the zero value is nowhere.
type target struct {
	scheme, path string
	// args are a log driver's, from the query: each key and its first value.
	args []string
}

// stdioPaths are the stdio fields of a request.
type stdioPaths struct {
	stdin, stdout, stderr string
	terminal              bool
}

// targets are those of stdin, stdout and stderr. What leads to /dev/null leads
// nowhere: the guest has one of its own. A terminal has one output.
func (s stdioPaths) targets() (t [3]target, err error) {
	for i, f := range [3]struct{ name, uri string }{{"stdin", s.stdin}, {"stdout", s.stdout}, {"stderr", s.stderr}} {
		if t[i], err = parseTarget(f.uri); err != nil {
			return t, fmt.Errorf("%s: %w: %w", f.name, err, errdefs.ErrInvalidArgument)
		}
	}
	if t[0].scheme == schemeBinary {
		return t, fmt.Errorf("stdin: scheme %q of %q: must be fifo or file: %w", schemeBinary, s.stdin, errdefs.ErrInvalidArgument)
	}
	if s.terminal {
		t[2] = target{}
	}
	return t, nil
}

// wants are the streams that are to be opened in the guest; check was called before.
func (s stdioPaths) wants() agentclient.StdioWants {
	t, err := s.targets()
	if err != nil {
		return agentclient.StdioWants{}
	}
	return agentclient.StdioWants{Stdin: t[0].scheme != "", Stdout: t[1].scheme != "", Stderr: t[2].scheme != ""}
}

// check refuses what cannot be opened, before anything is made.
func (s stdioPaths) check() error {
	_, err := s.targets()
	return err
}

func parseTarget(s string) (target, error) {
	if s == "" || s == os.DevNull {
		return target{}, nil
	}
	if strings.HasPrefix(s, "/") { // not parsed: a path may hold any character
		return target{scheme: schemeFIFO, path: s}, nil
	}
	u, err := url.Parse(s)
	if err != nil {
		return target{}, err
	}
	switch u.Scheme {
	case schemeFIFO, schemeFile, schemeBinary:
	default:
		return target{}, fmt.Errorf("scheme %q of %q: must be fifo, file or binary", u.Scheme, s)
	}
	if u.Host != "" || !filepath.IsAbs(u.Path) {
		return target{}, fmt.Errorf("%q: must name an absolute path, as in %s:///path", s, u.Scheme)
	}
	if u.Path == os.DevNull && u.Scheme != schemeBinary {
		return target{}, nil
	}
	t := target{scheme: u.Scheme, path: u.Path}
	if u.Scheme == schemeBinary {
		t.args, err = queryArgs(u.RawQuery)
	}
	return t, err
}

// queryArgs turns key=value&… into a driver's arguments: key, value, … in their
// order. Of a key that comes twice the first value counts, and a key without a
// value has an empty one (containerd process.NewBinaryCmd, whose order is random).
func queryArgs(query string) ([]string, error) {
	var args, seen []string
	for pair := range strings.SplitSeq(query, "&") {
		if pair == "" {
			continue
		}
		k, v, _ := strings.Cut(pair, "=")
		key, err := url.QueryUnescape(k)
		if err != nil {
			return nil, fmt.Errorf("query %q: %w", query, err)
		}
		value, err := url.QueryUnescape(v)
		if err != nil {
			return nil, fmt.Errorf("query %q: %w", query, err)
		}
		if !slices.Contains(seen, key) {
			seen = append(seen, key)
			args = append(args, key, value)
		}
	}
	return args, nil
}

// same tells whether two streams share a log driver.
func (t target) same(o target) bool {
	return t.scheme == o.scheme && t.path == o.path && slices.Equal(t.args, o.args)
}

// openOutput opens a pipe or a file for writing. It does not wait for a pipe's
// reader: opened both ways, a write never fails for want of one, it waits.
func openOutput(t target) (*os.File, error) {
	if t.scheme == schemeFile {
		if err := os.MkdirAll(filepath.Dir(t.path), 0o755); err != nil {
			return nil, err
		}
		return os.OpenFile(t.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	}
	f, err := os.OpenFile(t.path, os.O_RDWR|os.O_APPEND|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	widen(f)
	return f, nil
}

// openInput opens a pipe or file for reading. A pipe is held open for writing
// too, so that it has no end when its writer goes.
func openInput(t target) (r, keepOpen *os.File, err error) {
	if r, err = os.OpenFile(t.path, os.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
		return nil, nil, err
	}
	fi, err := r.Stat()
	if err == nil && fi.Mode()&os.ModeNamedPipe != 0 {
		widen(r)
		keepOpen, err = os.OpenFile(t.path, os.O_WRONLY|unix.O_NONBLOCK, 0)
	}
	if err != nil {
		r.Close()
		return nil, nil, err
	}
	return r, keepOpen, nil
}

// pipeSize is what a pipe between us and a client or a log driver holds.
const pipeSize = 256 << 10

// widen makes a pipe hold more than the usual 64 KiB, which saves two of three
// changes between its two sides. What is no pipe, and a kernel that says no
// (pipe(7), pipe-max-size), goes on as it is.
func widen(f *os.File) {
	rc, err := f.SyscallConn()
	if err != nil {
		return
	}
	_ = rc.Control(func(fd uintptr) {
		if size, err := unix.FcntlInt(fd, unix.F_GETPIPE_SZ, 0); err == nil && size < pipeSize {
			_, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeSize)
		}
	})
}
