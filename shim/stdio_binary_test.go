// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// driver writes a log driver as a shell script and returns its address.
func driver(t *testing.T, script, query string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "driver")
	must(t, os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o755))
	return "binary://" + path + query
}

// book is a ledger of children.
type book struct {
	mu   sync.Mutex
	pids map[int]string
}

func (b *book) record(name string, pid int) (func(), error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.pids == nil {
		b.pids = map[int]string{}
	}
	b.pids[pid] = name
	return func() { b.mu.Lock(); defer b.mu.Unlock(); delete(b.pids, pid) }, nil
}

func (b *book) len() int { b.mu.Lock(); defer b.mu.Unlock(); return len(b.pids) }

// logged runs a driver that collects its input in a directory, which is returned.
func logged(t *testing.T, h *stdioHost, id string, same bool, s *streams) (string, *stdio) {
	t.Helper()
	dir := t.TempDir()
	script := `d=$2; echo "$*" >$d/args; env | grep -v -e '^PWD=' -e '^_=' -e '^OLDPWD=' -e '^SHLVL=' | sort >$d/env; echo x >>$d/runs
exec 5>&-
cat <&4 >>$d/err & cat <&3 >>$d/out; wait`
	uri := driver(t, script, "?dir="+dir+"&k=v%201")
	paths := stdioPaths{stdout: uri}
	if same {
		paths.stderr = uri
	} else {
		s.Stdio.Stderr = nil
	}
	io, err := h.openStdio(id, paths)
	must(t, err)
	t.Cleanup(io.close)
	must(t, io.ready(bounded(t)))
	io.connect(&s.Stdio)
	return dir, io
}

func content(t *testing.T, path ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(path...))
	must(t, err)
	return string(b)
}

// One driver carries both streams when both name it; it gets its arguments and
// environment and everything that was written, and is gone after close.
func TestLogDriver(t *testing.T) {
	b := &book{}
	h, s := &stdioHost{namespace: "ns1", record: b.record}, newStreams()
	s.Stdio.Stdin = nil
	dir, io := logged(t, h, "box", true, s)
	if b.len() != 1 {
		t.Errorf("%d children recorded, want 1", b.len())
	}
	big := strings.Repeat("0123456789abcdef", 64<<10)
	_, err := s.stdout.Write([]byte(big))
	must(t, err)
	_, err = s.stderr.Write([]byte("complaint"))
	must(t, err)
	s.stdout.Close()
	s.stderr.Close()
	must(t, io.drain(bounded(t), time.Now()))
	io.close()
	if out := content(t, dir, "out"); out != big {
		t.Errorf("stdout: %d bytes of %d", len(out), len(big))
	}
	if out := content(t, dir, "err"); out != "complaint" {
		t.Errorf("stderr: %q", out)
	}
	if got, want := content(t, dir, "args"), "dir "+dir+" k v 1\n"; got != want {
		t.Errorf("arguments %q, want %q", got, want)
	}
	if got, want := content(t, dir, "env"), "CONTAINER_ID=box\nCONTAINER_NAMESPACE=ns1\n"; got != want {
		t.Errorf("environment %q, want %q", got, want)
	}
	if got := content(t, dir, "runs"); got != "x\n" {
		t.Errorf("the driver ran more than once: %q", got)
	}
	if b.len() != 0 || len(h.drivers) != 0 {
		t.Errorf("left: %v, %v", b.pids, h.drivers)
	}
}

// A stream that the driver does not carry is at its end from the beginning.
func TestLogDriverForOneStream(t *testing.T) {
	s := newStreams()
	s.Stdio.Stdin = nil
	dir, io := logged(t, &stdioHost{}, "box", false, s)
	_, err := s.stdout.Write([]byte("only"))
	must(t, err)
	s.stdout.Close()
	must(t, io.drain(bounded(t), time.Now()))
	io.close()
	if out, errs := content(t, dir, "out"), content(t, dir, "err"); out != "only" || errs != "" {
		t.Errorf("%q, %q", out, errs)
	}
}

// Every way not to become ready is an error that says why, and leaves no process.
func TestLogDriverFailures(t *testing.T) {
	b := &book{}
	h := &stdioHost{record: b.record}
	for _, c := range []struct{ name, script, want string }{
		{"dies", "echo no disk >&2; exit 3", "exit status 3; its stderr: no disk"},
		{"ends", "exit 0", "before it was ready: exit status 0"},
		{"is killed", "kill -9 $$", "signal: killed"},
		{"hangs", "echo stuck >&2; sleep 1000", "not ready"},
	} {
		t.Run(c.name, func(t *testing.T) {
			io, err := h.openStdio("x", stdioPaths{stdout: driver(t, c.script, "")})
			must(t, err)
			ctx := bounded(t)
			if c.name == "hangs" {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 50*time.Millisecond)
				defer cancel()
			}
			if err := soon(t, "ready", func() error { return io.ready(ctx) }); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v; want %q", err, c.want)
			}
			soon(t, "abort", func() int { io.abort(); return 0 })
			if b.len() != 0 {
				t.Errorf("left: %v", b.pids)
			}
		})
	}
	if _, err := h.openStdio("x", stdioPaths{stdout: "binary:///nonexistent/driver"}); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "/nonexistent/driver") {
		t.Errorf("a missing driver: %v", err)
	}
	h.record = func(string, int) (func(), error) { return nil, errors.New("no ledger") }
	if _, err := h.openStdio("x", stdioPaths{stdout: driver(t, "exec sleep 1000", "")}); err == nil || !strings.Contains(err.Error(), "no ledger") {
		t.Errorf("an unrecorded driver: %v", err)
	}
}

// A driver that writes to descriptor 5 is ready too, and closing the pod's
// streams ends a driver that nobody deleted.
func TestHostCloseEndsDrivers(t *testing.T) {
	h := &stdioHost{}
	io, err := h.openStdio("x", stdioPaths{stdout: driver(t, "echo >&5; cat <&3 >/dev/null", ""), stderr: driver(t, "exec 5>&-; exec sleep 1000", "")})
	must(t, err)
	must(t, io.ready(bounded(t)))
	pids := []int{io.drivers[0].cmd.Process.Pid, io.drivers[1].cmd.Process.Pid}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	soon(t, "close", func() int { h.close(ctx); return 0 })
	for i, pid := range pids {
		if err := unix.Kill(pid, 0); err != unix.ESRCH {
			t.Errorf("driver %d is still there: %v", i, err)
		}
	}
	if len(h.drivers) != 0 {
		t.Errorf("left: %v", h.drivers)
	}
	io.close()
}

// A driver that goes away does not stop the process: its output is dropped.
func TestLogDriverGoesAway(t *testing.T) {
	s := newStreams()
	s.Stdio.Stdin, s.Stdio.Stderr = nil, nil
	io, err := (&stdioHost{}).openStdio("x", stdioPaths{stdout: driver(t, "echo >&5; head -c 1 <&3 >/dev/null", "")})
	must(t, err)
	t.Cleanup(io.close)
	must(t, io.ready(bounded(t)))
	io.connect(&s.Stdio)
	soon(t, "writing", func() error {
		for range 100 {
			if _, err := fmt.Fprint(s.stdout, strings.Repeat("x", 64<<10)); err != nil {
				return err // the stream was closed, which the guest takes for "nobody reads"
			}
		}
		return nil
	})
	must(t, soon(t, "drain", func() error { return io.drain(bounded(t), time.Now()) }))
}
