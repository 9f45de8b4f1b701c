// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"
)

// stdioPod is the pod of the tests about standard streams.
const stdioPod = "stdio"

// TestStdio runs what is about standard streams in one pod of its own.
func TestStdio(t *testing.T) {
	b := newBox(t)
	b.startSpec(stdioPod, newSpec(t, "sleep", "100000").group(stdioPod))
	for _, part := range []struct {
		name string
		test func(*box)
	}{
		{"Schemes", testSchemes},
		{"LogURIs", testLogURIs},
		{"BadDrivers", testBadDrivers},
		{"ClientsComeAndGo", testClientsComeAndGo},
		{"Attach", testAttach},
		{"HalfClose", testHalfClose},
		{"InputNobodyReads", testInputNobodyReads},
		{"SlowReader", testSlowReader},
		{"Grandchild", testGrandchild},
		{"LastWords", testLastWords},
		{"Bulk", testBulk},
	} {
		t.Run(part.name, func(t *testing.T) { part.test(begin(t, b.c)) })
	}
}

// proc is a process that a test drives over the shim's socket: an exec, or, with
// no exec id, the first process of a container that containerd does not know.
type proc struct {
	*shimClient
	ctx      context.Context
	id, exec string
}

// addExec adds a process to a running container and starts it.
func (s *shimClient) addExec(ctx context.Context, id string, p *specs.Process, io pipes) *proc {
	s.Helper()
	x := &proc{s, ctx, id, s.exec(ctx, id, p, io)}
	x.start()
	return x
}

// addInit makes a container of the pod and starts it.
func (s *shimClient) addInit(ctx context.Context, sp *spec, io pipes) *proc {
	s.Helper()
	x := &proc{s, ctx, execID(), ""}
	bundle := filepath.Join(s.TempDir(), x.id)
	if err := os.Mkdir(bundle, 0o700); err != nil {
		s.Fatal(err)
	}
	sp.write(s.T, filepath.Join(bundle, "config.json"))
	if _, err := s.Create(ctx, &task.CreateTaskRequest{
		ID: x.id, Bundle: bundle, Terminal: sp.Process.Terminal, Stdin: io.stdin, Stdout: io.stdout, Stderr: io.stderr,
	}); err != nil {
		s.Fatal(err)
	}
	x.start()
	return x
}

func (x *proc) start() {
	x.Helper()
	if _, err := x.Start(x.ctx, &task.StartRequest{ID: x.id, ExecID: x.exec}); err != nil {
		x.Fatal(err)
	}
}

func (x *proc) closeStdin() {
	x.Helper()
	if _, err := x.CloseIO(x.ctx, &task.CloseIORequest{ID: x.id, ExecID: x.exec, Stdin: true}); err != nil {
		x.Error(err)
	}
}

func (x *proc) kill() {
	x.Helper()
	if _, err := x.Kill(x.ctx, &task.KillRequest{ID: x.id, ExecID: x.exec, Signal: 9}); err != nil {
		x.Error(err)
	}
}

// wait returns the status of the process once it has ended.
func (x *proc) wait() uint32 {
	x.Helper()
	w, err := x.Wait(x.ctx, &task.WaitRequest{ID: x.id, ExecID: x.exec})
	if err != nil {
		x.Fatal(err)
	}
	return w.ExitStatus
}

func (x *proc) delete() {
	x.Helper()
	if _, err := x.Delete(x.ctx, &task.DeleteRequest{ID: x.id, ExecID: x.exec}); err != nil {
		x.Error(err)
	}
}

// end waits for the process's end with a status, and deletes it at once.
func (x *proc) end(want uint32) {
	x.Helper()
	got := x.wait()
	x.delete()
	if got != want {
		x.Errorf("status %d, want %d", got, want)
	}
}

// tryExec is addExec for what must fail; it returns the error and leaves nothing.
func (s *shimClient) tryExec(ctx context.Context, id string, p *specs.Process, io pipes) error {
	s.Helper()
	data, err := json.Marshal(p)
	if err != nil {
		s.Fatal(err)
	}
	x := execID()
	_, err = s.Exec(ctx, &task.ExecProcessRequest{
		ID: id, ExecID: x, Stdin: io.stdin, Stdout: io.stdout, Stderr: io.stderr, Spec: &anypb.Any{TypeUrl: processType, Value: data},
	})
	if err != nil {
		return err
	}
	_, err = s.Start(ctx, &task.StartRequest{ID: id, ExecID: x})
	if _, derr := s.Delete(ctx, &task.DeleteRequest{ID: id, ExecID: x}); derr != nil {
		s.Errorf("delete of what did not start: %v", derr)
	}
	return err
}

// shell is a process that runs a script.
func shell(terminal bool, script string) *specs.Process {
	p := process("sh", "-c", script)
	p.Terminal = terminal
	return p
}

// logDriver writes a log driver that puts what it gets into a directory, and
// returns its address and that directory.
func logDriver(t *testing.T) (uri, dir string) {
	t.Helper()
	dir = t.TempDir()
	return driverScript(t, `d=$2
echo "$CONTAINER_ID $CONTAINER_NAMESPACE $*" >$d/who
exec 5>&-
cat <&3 >>$d/out & cat <&4 >>$d/err & wait
`) + "?dir=" + dir, dir
}

// text is what a file holds, without a terminal's carriage returns; nothing when
// it is not there.
func text(elements ...string) string {
	data, _ := os.ReadFile(filepath.Join(elements...))
	return lines(data)
}

// lines takes the carriage returns of a terminal out.
func lines(b []byte) string { return strings.ReplaceAll(string(b), "\r", "") }

// driverScript writes a log driver and returns its address.
func driverScript(t *testing.T, script string) string {
	t.Helper()
	path := writeFile(t, "#!/bin/sh\n"+script, t.TempDir(), "driver")
	if err := os.Chmod(path, 0o755); err != nil {
		t.Fatal(err)
	}
	return "binary://" + path
}
