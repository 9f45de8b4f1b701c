// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-v2/kata/integration/lab"
)

// processType is the type of an exec's specification (containerd typeurl
// registration of specs.Process).
const processType = "types.containerd.io/opencontainers/runtime-spec/1/Process"

// shimClient speaks containerd's Task API to a shim.
type shimClient struct {
	*testing.T
	task.TTRPCTaskService
}

// dialShim connects to the shim of a task of containerd.
func (b *box) dialShim(id string) *shimClient {
	b.Helper()
	shim, err := b.c.DialShim(id)
	return newShimClient(b.T, shim, err)
}

func dialTask(t *testing.T, address string) *shimClient {
	t.Helper()
	shim, err := lab.DialShimAt(address)
	return newShimClient(t, shim, err)
}

func newShimClient(t *testing.T, shim *lab.Shim, err error) *shimClient {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { shim.Close() })
	return &shimClient{t, shim}
}

// calls is a context for the calls of one test.
func calls(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	t.Cleanup(cancel)
	return ctx
}

// pipes are the named pipes of one process's standard streams.
type pipes struct{ stdin, stdout, stderr string }

func newPipes(t *testing.T) pipes {
	t.Helper()
	dir := t.TempDir()
	p := pipes{filepath.Join(dir, "0"), filepath.Join(dir, "1"), filepath.Join(dir, "2")}
	for _, path := range []string{p.stdin, p.stdout, p.stderr} {
		if err := unix.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// open opens one end of a pipe without waiting for the other end.
func open(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// output collects what a process writes to one of its pipes.
type output struct {
	data chan []byte // yields everything, once, at the end of the stream
	keep *os.File    // a writer: without one a reader sees an end that is none
}

// collect reads a pipe to its end on a goroutine. Call started as soon as the
// shim has opened its side.
func collect(t *testing.T, path string) *output {
	t.Helper()
	f := open(t, path, os.O_RDONLY)
	o := &output{data: make(chan []byte, 1), keep: open(t, path, os.O_WRONLY)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		data, _ := io.ReadAll(f)
		o.data <- data
	}()
	t.Cleanup(func() { f.Close(); <-done })
	return o
}

// started lets the end of the shim's side be the end of the stream.
func (o *output) started() { o.keep.Close() }

// exec adds a process; its id is returned.
func (s *shimClient) exec(ctx context.Context, id string, p *specs.Process, io pipes) string {
	s.Helper()
	data, err := json.Marshal(p)
	if err != nil {
		s.Fatal(err)
	}
	x := execID()
	if _, err := s.Exec(ctx, &task.ExecProcessRequest{
		ID: id, ExecID: x, Terminal: p.Terminal, Stdin: io.stdin, Stdout: io.stdout, Stderr: io.stderr,
		Spec: &anypb.Any{TypeUrl: processType, Value: data},
	}); err != nil {
		s.Fatal(err)
	}
	return x
}

// process is a command as a container of the lab would run it.
func process(args ...string) *specs.Process {
	return &specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}}
}

// receive waits for a value.
func receive[T any](t *testing.T, what string, from <-chan T) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(callTimeout):
		t.Fatalf("%s: nothing within %v", what, callTimeout)
		panic("unreachable")
	}
}
