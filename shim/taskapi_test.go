// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
)

// kinds are the words of docs/task-api.md.
var kinds = map[string]func(error) bool{
	"ok": func(err error) bool { return err == nil },
	"waits": func(err error) bool { // given up by our side, or by the shim's
		return errors.Is(err, context.DeadlineExceeded) || grpcstatus.Code(err) == codes.DeadlineExceeded
	},
	"NotFound":           errdefs.IsNotFound,
	"AlreadyExists":      errdefs.IsAlreadyExists,
	"FailedPrecondition": errdefs.IsFailedPrecondition,
	"InvalidArgument":    errdefs.IsInvalidArgument,
	"NotImplemented":     errdefs.IsNotImplemented,
}

// docTable reads one table of docs/task-api.md, by its section: the cells of
// each row, the first row being the head.
func docTable(t *testing.T, section string) [][]string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "docs", "task-api.md"))
	must(t, err)
	_, text, found := strings.Cut(string(data), "## "+section+"\n")
	if !found {
		t.Fatalf("no section %q", section)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	var rows [][]string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "|") || strings.HasPrefix(line, "|--") {
			continue
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		rows = append(rows, cells)
	}
	return rows
}

// call is one request with the message that takes its answer.
type apiCall struct {
	method    string
	req, resp any
}

// callOf makes the request that a row of the tables names.
func callOf(t *testing.T, p *pod, row, id, exec string) apiCall {
	t.Helper()
	proc := jsonAny(t, specs.Process{Args: []string{"sleep"}, Cwd: "/"})
	switch row {
	case "`Create` of this id":
		return apiCall{"Create", &task.CreateTaskRequest{ID: id, Bundle: p.bundle(id, "sleep")}, &task.CreateTaskResponse{}}
	case "`Exec` of this id":
		return apiCall{"Exec", &task.ExecProcessRequest{ID: id, ExecID: exec, Spec: proc}, &emptypb.Empty{}}
	case "`Exec`":
		return apiCall{"Exec", &task.ExecProcessRequest{ID: id, ExecID: "new", Spec: proc}, &emptypb.Empty{}}
	case "`Start`":
		return apiCall{"Start", &task.StartRequest{ID: id, ExecID: exec}, &task.StartResponse{}}
	case "`State`":
		return apiCall{"State", &task.StateRequest{ID: id, ExecID: exec}, &task.StateResponse{}}
	case "`Pids`":
		return apiCall{"Pids", &task.PidsRequest{ID: id}, &task.PidsResponse{}}
	case "`Connect`":
		return apiCall{"Connect", &task.ConnectRequest{ID: id}, &task.ConnectResponse{}}
	case "`Wait`":
		return apiCall{"Wait", &task.WaitRequest{ID: id, ExecID: exec}, &task.WaitResponse{}}
	case "`Kill`", "`Kill` of all":
		return apiCall{"Kill", &task.KillRequest{ID: id, ExecID: exec, Signal: 9, All: strings.HasSuffix(row, "all")}, &emptypb.Empty{}}
	case "`Pause`":
		return apiCall{"Pause", &task.PauseRequest{ID: id}, &emptypb.Empty{}}
	case "`Resume`":
		return apiCall{"Resume", &task.ResumeRequest{ID: id}, &emptypb.Empty{}}
	case "`ResizePty`", "`ResizePty` of a terminal":
		return apiCall{"ResizePty", &task.ResizePtyRequest{ID: id, ExecID: exec, Width: 80, Height: 25}, &emptypb.Empty{}}
	case "`CloseIO`":
		return apiCall{"CloseIO", &task.CloseIORequest{ID: id, ExecID: exec, Stdin: true}, &emptypb.Empty{}}
	case "`Update`":
		return apiCall{"Update", &task.UpdateTaskRequest{ID: id, Resources: jsonAny(t, specs.LinuxResources{})}, &emptypb.Empty{}}
	case "`Stats`":
		return apiCall{"Stats", &task.StatsRequest{ID: id}, &task.StatsResponse{}}
	case "`Checkpoint`":
		return apiCall{"Checkpoint", &task.CheckpointTaskRequest{ID: id, Path: "/c"}, &emptypb.Empty{}}
	case "`Delete`":
		return apiCall{"Delete", &task.DeleteRequest{ID: id, ExecID: exec}, &task.DeleteResponse{}}
	case "`Shutdown`":
		return apiCall{"Shutdown", &task.ShutdownRequest{ID: id}, &emptypb.Empty{}}
	}
	t.Fatalf("no call for the row %s", row)
	return apiCall{}
}

// makeTask brings a new task into the state that a column names.
func (p *pod) makeTask(id, state string, terminal bool) {
	p.t.Helper()
	if state == "no task" {
		return
	}
	_, err := p.tasks().Create(bounded(p.t), &task.CreateTaskRequest{ID: id, Bundle: p.bundle(id, "sleep"), Terminal: terminal})
	must(p.t, err)
	if state == "created" {
		return
	}
	p.start(id, "")
	switch state {
	case "paused", "container paused":
		_, err = p.tasks().Pause(bounded(p.t), &task.PauseRequest{ID: id})
	case "stopped":
		_, err = p.tasks().Kill(bounded(p.t), &task.KillRequest{ID: id, Signal: 9})
		p.wait(id, "")
	case "machine gone":
		err = syscall.Kill(p.sb.PID(), syscall.SIGKILL)
		p.wait(id, "")
		<-p.sb.Ended()
	}
	must(p.t, err)
}

// makeExec brings a process that Exec adds to a new task into the state that a column names.
func (p *pod) makeExec(id, exec, state string, terminal bool) {
	p.t.Helper()
	p.makeTask(id, "running", false)
	if state == "no exec" {
		return
	}
	p.exec(id, exec, stdioPaths{terminal: terminal}, "sleep")
	if state == "created" {
		return
	}
	p.start(id, exec)
	var err error
	switch state {
	case "stopped":
		_, err = p.tasks().Kill(bounded(p.t), &task.KillRequest{ID: id, ExecID: exec, Signal: 9})
		p.wait(id, exec)
	case "container paused":
		_, err = p.tasks().Pause(bounded(p.t), &task.PauseRequest{ID: id})
	case "machine gone":
		err = syscall.Kill(p.sb.PID(), syscall.SIGKILL)
		p.wait(id, exec)
		<-p.sb.Ended()
	}
	must(p.t, err)
}

// try makes a call and compares its end with a word of the tables. What may wait
// is given up soon; that it would go on for ever shows in time only.
func (p *pod) try(service, where, word string, c apiCall) {
	p.t.Helper()
	kind, ok := kinds[word]
	if !ok {
		p.t.Fatalf("%s: the word %q", where, word)
	}
	call := p.call
	if word == "waits" {
		call = func(service, method string, req, resp any) error {
			ctx, cancel := context.WithTimeout(bounded(p.t), 20*time.Millisecond)
			defer cancel()
			return p.v3.Call(ctx, service, method, req, resp)
		}
	}
	if err := call(service, c.method, c.req, c.resp); !kind(err) {
		p.t.Errorf("%s, %s: %v; want %s", where, service, err, word)
	}
}

// Every cell of the first two tables of docs/task-api.md.
func TestTaskAPITables(t *testing.T) {
	for _, table := range []struct{ section, exec string }{
		{"The first process, by the state of the task", ""},
		{"A process that Exec added", "e1"},
	} {
		rows := docTable(t, table.section)
		if len(rows) < 9 {
			t.Fatalf("%s: %d rows", table.section, len(rows))
		}
		shared := newPod(t)
		methods := map[string]bool{}
		for n, row := range rows[1:] {
			for col, state := range rows[0][1:] {
				for _, service := range []string{taskV2, taskV3} {
					p := shared
					if state == "machine gone" {
						p = newPod(t)
					}
					id := fmt.Sprintf("c%d-%d-%s", n, col, service[len("containerd.task."):len("containerd.task.")+2])
					terminal := strings.HasSuffix(row[0], "terminal")
					if table.exec == "" {
						p.makeTask(id, state, terminal)
					} else {
						p.makeExec(id, table.exec, state, terminal)
					}
					c := callOf(t, p, row[0], id, table.exec)
					p.try(service, row[0]+" when "+state, row[col+1], c)
					methods[c.method] = true
				}
			}
		}
		if table.exec == "" && len(methods) != 17 {
			t.Errorf("the table has the methods %v; the service has 17", slices.Sorted(maps.Keys(methods)))
		}
	}
	p := newPod(t)
	if err := p.call(taskV3, "NoSuchMethod", &emptypb.Empty{}, &emptypb.Empty{}); !errdefs.IsNotImplemented(err) {
		t.Errorf("unknown method: %v", err)
	}
}

// Every row of the third table of docs/task-api.md, and no bad input beside them.
func TestTaskAPIBadInput(t *testing.T) {
	p := newPod(t)
	p.create("c1", "sleep")
	p.start("c1", "")
	bad := &anypb.Any{TypeUrl: "x", Value: []byte("{")}
	proc := jsonAny(t, specs.Process{Args: []string{"true"}, Cwd: "/"})
	broken := t.TempDir()
	must(t, os.WriteFile(filepath.Join(broken, "config.json"), []byte("{"), 0o600))
	create := func(r *task.CreateTaskRequest) apiCall {
		r.ID = "x"
		if r.Bundle == "" {
			r.Bundle = p.bundle("x", "sleep")
		}
		return apiCall{"Create", r, &task.CreateTaskResponse{}}
	}
	exec := func(id, stdout string, spec *anypb.Any) apiCall {
		return apiCall{"Exec", &task.ExecProcessRequest{ID: "c1", ExecID: id, Spec: spec, Stdout: stdout}, &emptypb.Empty{}}
	}
	p.exec("c1", "missing", stdioPaths{}, "no-such-program")
	cases := map[string]apiCall{
		"`Create` `bundle` a directory without config.json":   create(&task.CreateTaskRequest{Bundle: t.TempDir()}),
		"`Create` `bundle` config.json that is not JSON":      create(&task.CreateTaskRequest{Bundle: broken}),
		"`Create` `process.args` no command":                  create(&task.CreateTaskRequest{Bundle: p.bundle("x")}),
		"`Create` `process.args` a program that is not there": create(&task.CreateTaskRequest{Bundle: p.bundle("x", "no-such-program")}),
		"`Create` `stdout` a pipe that is not there":          create(&task.CreateTaskRequest{Stdout: filepath.Join(t.TempDir(), "none")}),
		"`Create` `stdin` the scheme tcp":                     create(&task.CreateTaskRequest{Stdin: "tcp://x"}),
		"`Create` `checkpoint` a path":                        create(&task.CreateTaskRequest{Checkpoint: "/c"}),
		"`Exec` `spec` not JSON":                              exec("e", "", bad),
		"`Exec` `spec.args` no command":                       exec("e", "", jsonAny(t, specs.Process{})),
		"`Exec` `exec_id` the container's id":                 exec("c1", "", proc),
		"`Exec` `stdout` the scheme tcp":                      exec("e", "tcp://x", proc),
		"`Start` `exec_id` a program that is not there":       {"Start", &task.StartRequest{ID: "c1", ExecID: "missing"}, &task.StartResponse{}},
		"`Update` `resources` not JSON":                       {"Update", &task.UpdateTaskRequest{ID: "c1", Resources: bad}, &emptypb.Empty{}},
	}
	for _, row := range docTable(t, "Bad input")[1:] {
		name := strings.Join(row[:3], " ")
		c, ok := cases[name]
		if !ok {
			t.Errorf("no case for %s", name)
			continue
		}
		delete(cases, name)
		p.try(taskV3, name, row[3], c)
	}
	for name := range cases {
		t.Errorf("%s is not in docs/task-api.md", name)
	}
	if got := p.agent.Containers(); !slices.Equal(got, []string{"c1"}) {
		t.Errorf("the guest holds %q", got)
	}
}
