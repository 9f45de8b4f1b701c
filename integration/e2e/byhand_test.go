// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	events "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
)

// shimProgram is the program under test.
func shimProgram(t *testing.T) string {
	t.Helper()
	return filepath.Join(buildDir(t), "bin", "containerd-shim-kata-v2")
}

// invoke runs the program as containerd would, with a standard input.
func (b *box) invoke(dir string, stdin []byte, args ...string) (stdout, stderr string, code int) {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, shimProgram(b.T), args...)
	cmd.Dir, cmd.Stdin = dir, bytes.NewReader(stdin)
	cmd.Env = append(os.Environ(), "KATA_CONF_FILE="+b.c.ConfigFile())
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); cmd.ProcessState == nil || ctx.Err() != nil {
		b.Fatalf("%s %v: %v, %v", cmd.Path, args, err, ctx.Err())
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func marshal(t *testing.T, m proto.Message) []byte {
	t.Helper()
	data, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestShimProgram: the program by itself; every wrong call says what is wrong,
// on stderr, and leaves nothing.
func TestShimProgram(t *testing.T) {
	b := newBox(t)
	out, errs, code := b.invoke("", nil, "-v")
	if code != 0 || !strings.Contains(out, "containerd-shim-kata-v2") || errs != "" {
		t.Errorf("-v: status %d, stdout %q, stderr %q", code, out, errs)
	}
	out, errs, code = b.invoke("", nil, "-info")
	var info types.RuntimeInfo
	if err := proto.Unmarshal([]byte(out), &info); err != nil || code != 0 || info.Name != runtimeName || info.Features == nil || errs != "" {
		t.Errorf("-info: status %d, %v, %v, stderr %q", code, err, &info, errs)
	}
	bundle := t.TempDir()
	newSpec(t, "true").write(t, filepath.Join(bundle, "config.json"))
	params := func(p *bootapi.BootstrapParams) []byte { return marshal(t, p) }
	start := []string{"-namespace", "byhand", "-id", "x", "start"}
	good := &bootapi.BootstrapParams{InstanceID: "x", Namespace: "byhand"}
	broken := &anypb.Any{TypeUrl: "runtimeoptions.v1.Options", Value: []byte{0xff}}
	for _, c := range []struct {
		name, dir string
		stdin     []byte
		args      []string
		words     []string
	}{
		{"no action", bundle, nil, nil, []string{"start", "delete"}},
		{"unknown flag", bundle, nil, []string{"-colour", "start"}, []string{"colour"}},
		{"no namespace", bundle, nil, []string{"-id", "x", "start"}, []string{"-namespace"}},
		{"no id", bundle, nil, []string{"-namespace", "byhand", "start"}, []string{"-id"}},
		{"id with a slash", bundle, nil, []string{"-namespace", "byhand", "-id", "../x", "start"}, []string{"-id", "../x"}},
		{"malformed stdin", bundle, []byte("{\"this\": \"is no protobuf\"}"), start, []string{"standard input"}},
		{"parameters of another container", bundle, params(&bootapi.BootstrapParams{InstanceID: "y", Namespace: "byhand"}), start, []string{`"y"`}},
		{"unknown options", bundle, marshal(t, &anypb.Any{TypeUrl: "example.Options", Value: []byte{8, 1}}), start, []string{"runtime options", "example.Options"}},
		{"malformed options", bundle, marshal(t, broken), start, []string{"runtime options"}},
		{"malformed options of the new protocol", bundle, params(&bootapi.BootstrapParams{InstanceID: "x", Namespace: "byhand", Extensions: []*bootapi.Extension{{Value: broken}}}), start, []string{"runtime options"}},
		{"malformed specification", badBundle(t), params(good), start, []string{"config.json"}},
	} {
		out, errs, code := b.invoke(c.dir, c.stdin, c.args...)
		if code == 0 || out != "" {
			t.Errorf("%s: status %d, stdout %q; want a failure without an answer", c.name, code, out)
		}
		for _, w := range c.words {
			if !strings.Contains(errs, w) {
				t.Errorf("%s: the error does not name %q: %s", c.name, w, errs)
			}
		}
		if strings.Contains(errs, "goroutine") {
			t.Errorf("%s: a panic: %s", c.name, errs)
		}
	}
	// Deleting what never was is done; containerd calls it whenever in doubt.
	if _, errs, code := b.invoke(bundle, nil, "-namespace", "byhand", "-id", "x", "delete"); code != 0 {
		t.Errorf("delete of nothing: status %d: %s", code, errs)
	}
}

func badBundle(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	writeFile(t, "{", dir, "config.json")
	return dir
}

// eventLog is containerd's side of the shim's events.
type eventLog struct{ got chan string }

func (e *eventLog) Forward(_ context.Context, r *events.ForwardRequest) (*emptypb.Empty, error) {
	e.got <- r.Envelope.Topic
	return &emptypb.Empty{}, nil
}

// serveEvents takes a shim's events; the address is of a socket of the test.
func serveEvents(t *testing.T) (*eventLog, string) {
	t.Helper()
	address := filepath.Join(t.TempDir(), "events.sock")
	l, err := net.Listen("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	e := &eventLog{got: make(chan string, 100)}
	events.RegisterTTRPCEventsService(server, e)
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		server.Close()
		<-served
	})
	return e, address
}

// startByHand starts a shim as containerd 2.4 does, without containerd.
func (b *box) startByHand(id string, s *spec, eventsAddress string) (*shimClient, string) {
	b.Helper()
	bundle := filepath.Join(b.TempDir(), id)
	if err := os.Mkdir(bundle, 0o700); err != nil {
		b.Fatal(err)
	}
	s.write(b.T, filepath.Join(bundle, "config.json"))
	stdin := marshal(b.T, &bootapi.BootstrapParams{InstanceID: id, Namespace: "byhand", ContainerdTtrpcAddress: eventsAddress})
	// Whatever becomes of the test, the shim and its machine end with it.
	b.Cleanup(func() {
		if _, errs, code := b.invoke(bundle, nil, "-namespace", "byhand", "-id", id, "delete"); code != 0 {
			b.Errorf("delete: status %d: %s", code, errs)
		}
	})
	out, errs, code := b.invoke(bundle, stdin, "-namespace", "byhand", "-id", id, "start")
	var result bootapi.BootstrapResult
	if err := proto.Unmarshal([]byte(out), &result); err != nil || code != 0 || errs != "" || result.Protocol != "ttrpc" || result.Version != 3 {
		b.Fatalf("start: status %d, %v, %v, stderr %q", code, err, &result, errs)
	}
	return dialTask(b.T, result.Address), bundle
}

// TestShimByHand drives one container through its life over the shim's socket:
// what ctr never does is to delete in the very moment of the end.
func TestShimByHand(t *testing.T) {
	b := newBox(t)
	seen, address := serveEvents(t)
	ctx, id := calls(t), "byhand"
	dir, content := longFile(b)
	s, bundle := b.startByHand(id, newSpec(t, "sh", "-c", "cat /in/long; echo end >&2; exit 9").mount("bind", dir, "/in", "rbind", "ro"), address)

	io := newPipes(t)
	out, errs := collect(t, io.stdout), collect(t, io.stderr)
	c, err := s.Create(ctx, &task.CreateTaskRequest{ID: id, Bundle: bundle, Stdout: io.stdout, Stderr: io.stderr})
	if err != nil {
		t.Fatal(err)
	}
	out.started()
	errs.started()
	if _, err := s.Create(ctx, &task.CreateTaskRequest{ID: id, Bundle: bundle}); status.Code(err) != codes.AlreadyExists {
		t.Errorf("a second Create: %v; want AlreadyExists", err)
	}
	st, err := s.State(ctx, &task.StateRequest{ID: id})
	if err != nil || st.Status != tasktypes.Status_CREATED || st.Pid != c.Pid || st.Stdout != io.stdout {
		t.Errorf("State after Create: %v, %v", st, err)
	}
	if _, err := s.Start(ctx, &task.StartRequest{ID: id}); err != nil {
		t.Fatal(err)
	}
	w, err := s.Wait(ctx, &task.WaitRequest{ID: id})
	if err != nil || w.ExitStatus != 9 || w.ExitedAt == nil {
		t.Errorf("Wait: %v, %v", w, err)
	}
	d, err := s.Delete(ctx, &task.DeleteRequest{ID: id})
	if err != nil || d.ExitStatus != 9 || !d.ExitedAt.AsTime().Equal(w.ExitedAt.AsTime()) {
		t.Errorf("Delete: %v, %v; want what Wait said, %v", d, err, w)
	}
	b.wantBytes("stdout", receive(t, "stdout", out.data), content)
	if got := receive(t, "stderr", errs.data); string(got) != "end\n" {
		t.Errorf("stderr %q", got)
	}
	if _, err := s.Delete(ctx, &task.DeleteRequest{ID: id}); status.Code(err) != codes.NotFound {
		t.Errorf("a second Delete: %v; want NotFound", err)
	}
	b.endByHand(ctx, s, id)
	var topics []string
	for len(topics) < 4 {
		topics = append(topics, receive(t, "event after "+strings.Join(topics, ", "), seen.got))
	}
	if want := []string{"/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"}; !slices.Equal(topics, want) {
		t.Errorf("events %v, want %v", topics, want)
	}
}

// endByHand calls Shutdown, as containerd does after the last Delete, and waits for the shim's end.
func (b *box) endByHand(ctx context.Context, s *shimClient, id string) {
	b.Helper()
	con, err := s.Connect(ctx, &task.ConnectRequest{ID: id})
	if err != nil {
		b.Fatal(err)
	}
	fd, err := unix.PidfdOpen(int(con.ShimPid), 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(fd)
	began := time.Now()
	// The answer may be cut off by the end that it is about.
	if _, err := s.Shutdown(ctx, &task.ShutdownRequest{ID: id}); err != nil && !strings.Contains(err.Error(), "closed") {
		b.Errorf("Shutdown: %v", err)
	}
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 5000); n != 1 {
		b.Errorf("the shim did not end within 5 s of Shutdown: %v", err)
	}
	b.Logf("from Shutdown to the end: %v", time.Since(began).Round(time.Millisecond))
}
