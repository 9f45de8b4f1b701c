// SPDX-License-Identifier: Apache-2.0

package guestagent_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// TestGuest boots one machine and goes through what a runtime does with it.
func TestGuest(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a virtual machine")
	}
	g := startGuest(t, "agent.passfd_listener_port=1027 agent.hotplug_timeout=3")
	t.Logf("ready %v after QEMU's start", g.ready)
	ctx := context.Background()
	if _, err := g.CreateSandbox(ctx, &agentpb.CreateSandboxRequest{Hostname: "pod1", SandboxId: "s1", Dns: []string{"192.0.2.1", "options ndots:5"}}); err != nil {
		t.Fatal(err)
	}
	for _, s := range []struct {
		name string
		run  func(*testing.T, *guest)
	}{
		{"details", testDetails}, {"output", testOutput}, {"exit", testExit}, {"missing", testMissing},
		{"exec", testExec}, {"execLatency", testExecLatency}, {"stdin", testStdin}, {"tty", testTTY},
		{"signals", testSignals}, {"grandchild", testGrandchild}, {"digest", testDigest},
		{"limits", testLimits}, {"devices", testDevices}, {"oom", testOOM}, {"pause", testPause},
		{"stats", testStats}, {"pod", testPod}, {"storage", testStorage}, {"readonly", testReadonly}, {"seccomp", testSeccomp}, {"null", testNullStdio}, {"remove", testRemoveRunning},
		{"many", testMany}, {"clean", testClean},
	} {
		t.Run(s.name, func(t *testing.T) { s.run(t, g) })
	}
	if _, err := g.DestroySandbox(ctx, &agentpb.DestroySandboxRequest{}); err != nil {
		t.Error(err)
	}
}

// box is a container under test.
type box struct {
	t        *testing.T
	g        *guest
	id       string
	out, err net.Conn
	in       net.Conn
}

func (g *guest) create(t *testing.T, id string, s *agentpb.Spec, tune ...func(*agentpb.CreateContainerRequest)) *box {
	t.Helper()
	b := &box{t: t, g: g, id: id}
	req := &agentpb.CreateContainerRequest{ContainerId: id, OCI: s}
	b.in, req.StdinPort = g.stream(t)
	b.out, req.StdoutPort = g.stream(t)
	if !s.Process.Terminal {
		b.err, req.StderrPort = g.stream(t)
	}
	for _, f := range tune {
		f(req)
	}
	if _, err := g.CreateContainer(bounded(t), req); err != nil {
		t.Fatalf("create %s: %v", id, err)
	}
	t.Cleanup(func() { b.remove() })
	return b
}

func (b *box) start() *box {
	b.t.Helper()
	if _, err := b.g.StartContainer(bounded(b.t), &agentpb.StartContainerRequest{ContainerId: b.id}); err != nil {
		b.t.Fatalf("start %s: %v", b.id, err)
	}
	return b
}

func (b *box) wait(exec string) int {
	b.t.Helper()
	r, err := b.g.WaitProcess(bounded(b.t), &agentpb.WaitProcessRequest{ContainerId: b.id, ExecId: exec})
	if err != nil {
		b.t.Fatalf("wait %s/%s: %v", b.id, exec, err)
	}
	return int(r.Status)
}

func (b *box) remove() {
	_, err := b.g.RemoveContainer(bounded(b.t), &agentpb.RemoveContainerRequest{ContainerId: b.id})
	if err != nil && status.Code(err) != codes.NotFound {
		b.t.Errorf("remove %s: %v", b.id, err)
	}
}

func (b *box) signal(exec string, sig uint32) error {
	_, err := b.g.SignalProcess(bounded(b.t), &agentpb.SignalProcessRequest{ContainerId: b.id, ExecId: exec, Signal: sig})
	return err
}

// read returns everything up to the end of the stream.
func read(t *testing.T, c net.Conn) string {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
	b, err := io.ReadAll(c)
	if err != nil {
		t.Fatalf("read: %v after %q", err, b)
	}
	return string(b)
}

// exec runs a process and returns its stdio.
func (b *box) exec(id string, p *agentpb.Process) (in, out, errc net.Conn) {
	b.t.Helper()
	req := &agentpb.ExecProcessRequest{ContainerId: b.id, ExecId: id, Process: p}
	in, req.StdinPort = b.g.stream(b.t)
	out, req.StdoutPort = b.g.stream(b.t)
	if !p.Terminal {
		errc, req.StderrPort = b.g.stream(b.t)
	}
	if _, err := b.g.ExecProcess(bounded(b.t), req); err != nil {
		b.t.Fatalf("exec %s: %v", id, err)
	}
	return in, out, errc
}

func testDetails(t *testing.T, g *guest) {
	d, err := g.GetGuestDetails(bounded(t), &agentpb.GuestDetailsRequest{MemBlockSize: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{protocols.FeatureReadyDial, protocols.FeatureStdioStreams, "pids", "tcp-forward"} {
		if !slices.Contains(d.AgentDetails.ExtraFeatures, f) {
			t.Errorf("feature %s is not announced: %v", f, d.AgentDetails.ExtraFeatures)
		}
	}
	h, err := g.health.Check(bounded(t), &agentpb.CheckRequest{})
	if err != nil || h.Status != agentpb.HealthCheckResponse_SERVING {
		t.Errorf("health: %v, %v", h, err)
	}
}

func testOutput(t *testing.T, g *guest) {
	script := `echo hello; echo oops >&2; id -u; hostname; ulimit -n; ls /sys/fs/cgroup | grep -c cgroup.procs; echo $$`
	start := time.Now()
	b := g.create(t, "out", spec("sh", "-c", script))
	created := time.Since(start)
	b.start()
	started := time.Since(start)
	if got, want := read(t, b.out), "hello\n0\nbox\n1024\n1\n1\n"; got != want {
		t.Errorf("stdout %q, want %q", got, want)
	}
	if got := read(t, b.err); got != "oops\n" {
		t.Errorf("stderr %q", got)
	}
	if code := b.wait(""); code != 0 {
		t.Errorf("status %d", code)
	}
	t.Logf("created %v, started %v, ended %v (first container)", created, started, time.Since(start))
	start = time.Now()
	b2 := g.create(t, "out2", spec("true"))
	created = time.Since(start)
	b2.start().wait("")
	t.Logf("second: created %v, ended %v", created, time.Since(start))
	start = time.Now()
	b2.remove()
	t.Logf("removed in %v", time.Since(start))
}

func testExit(t *testing.T, g *guest) {
	for i, c := range []struct {
		script string
		want   int
	}{{"exit 7", 7}, {"kill -TERM $$; sleep 1; exit 3", 3}, {"sh -c 'kill -KILL $$'; exit $?", 137}} {
		b := g.create(t, fmt.Sprintf("exit%d", i), spec("sh", "-c", c.script)).start()
		if got := b.wait(""); got != c.want {
			t.Errorf("%s: status %d, want %d", c.script, got, c.want)
		}
		if got := b.wait(b.id); got != c.want {
			t.Errorf("%s: second wait: status %d", c.script, got)
		}
	}
}

func testMissing(t *testing.T, g *guest) {
	s := spec("/no/such/program")
	req := &agentpb.CreateContainerRequest{ContainerId: "missing", OCI: s}
	_, err := g.CreateContainer(bounded(t), req)
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("create: %v", err)
	}
	b := g.create(t, "missing", spec("sleep", "100")).start()
	_, err = g.ExecProcess(bounded(t), &agentpb.ExecProcessRequest{ContainerId: b.id, ExecId: "e", Process: process("nope")})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "nope") {
		t.Errorf("exec: %v", err)
	}
	for _, want := range []struct {
		code codes.Code
		err  error
	}{
		{codes.NotFound, call(g.StartContainer(bounded(t), &agentpb.StartContainerRequest{ContainerId: "absent"}))},
		{codes.FailedPrecondition, call(g.StartContainer(bounded(t), &agentpb.StartContainerRequest{ContainerId: b.id}))},
		{codes.AlreadyExists, call(g.CreateContainer(bounded(t), &agentpb.CreateContainerRequest{ContainerId: b.id, OCI: s}))},
		{codes.InvalidArgument, call(g.CreateContainer(bounded(t), &agentpb.CreateContainerRequest{ContainerId: "../x", OCI: s}))},
		{codes.InvalidArgument, call(g.CreateContainer(bounded(t), &agentpb.CreateContainerRequest{ContainerId: "y"}))},
		{codes.NotFound, b.signal("none", 15)},
		{codes.Unimplemented, call(g.SetPolicy(bounded(t), &agentpb.SetPolicyRequest{}))},
		{codes.AlreadyExists, call(g.CreateSandbox(bounded(t), &agentpb.CreateSandboxRequest{}))},
	} {
		if status.Code(want.err) != want.code {
			t.Errorf("got %v, want %v", want.err, want.code)
		}
	}
}

func call(_ any, err error) error { return err }

func testExec(t *testing.T, g *guest) {
	b := g.create(t, "exec", spec("sleep", "1000")).start()
	p := process("sh", "-c", "echo $A; id -u; id -g; cat; exit 5")
	p.Env, p.User = append(p.Env, "A=b"), &agentpb.User{UID: 1000, GID: 1001}
	in, out, errc := b.exec("e1", p)
	if _, err := in.Write([]byte("typed")); err != nil {
		t.Fatal(err)
	}
	if err := in.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got := read(t, out); got != "b\n1000\n1001\ntyped" {
		t.Errorf("stdout %q", got)
	}
	if got := read(t, errc); got != "" {
		t.Errorf("stderr %q", got)
	}
	if code := b.wait("e1"); code != 5 {
		t.Errorf("status %d", code)
	}
}

func testExecLatency(t *testing.T, g *guest) {
	b := g.create(t, "lat", spec("sleep", "1000")).start()
	var all []time.Duration
	for i := range 15 {
		id := fmt.Sprintf("l%d", i)
		start := time.Now()
		req := &agentpb.ExecProcessRequest{ContainerId: b.id, ExecId: id, Process: process("true")}
		_, req.StdoutPort = g.stream(t)
		if _, err := g.ExecProcess(bounded(t), req); err != nil {
			t.Fatal(err)
		}
		if code := b.wait(id); code != 0 {
			t.Errorf("status %d", code)
		}
		all = append(all, time.Since(start))
	}
	slices.Sort(all)
	t.Logf("exec of true, dial to status: median %v, min %v, max %v of %d", all[len(all)/2], all[0], all[len(all)-1], len(all))
}

func testStdin(t *testing.T, g *guest) {
	b := g.create(t, "stdin", spec("cat")).start()
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<14)
	go func() {
		_, _ = b.in.Write(big)
		_ = b.in.(interface{ CloseWrite() error }).CloseWrite()
	}()
	if got := read(t, b.out); got != string(big) {
		t.Errorf("%d bytes came back of %d", len(got), len(big))
	}
	if code := b.wait(""); code != 0 {
		t.Errorf("status %d", code)
	}
}

func testTTY(t *testing.T, g *guest) {
	s := spec("sh", "-c", "stty size; cat; stty size; echo done")
	s.Process.Terminal, s.Process.ConsoleSize = true, &agentpb.Box{Height: 24, Width: 80}
	b := g.create(t, "tty", s).start()
	out := bufferOf(b.out)
	out.until(t, "24 80")
	if _, err := g.TtyWinResize(bounded(t), &agentpb.TtyWinResizeRequest{ContainerId: b.id, Row: 50, Column: 132}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.in.Write([]byte("line\n\x04")); err != nil { // ^D ends cat
		t.Fatal(err)
	}
	out.until(t, "50 132")
	out.until(t, "done")
	if code := b.wait(""); code != 0 {
		t.Errorf("status %d", code)
	}
	x := g.create(t, "tty2", spec("sleep", "100")).start()
	p := process("sh", "-c", "test -t 0 && test -t 1 && echo terminal")
	p.Terminal = true
	_, o, _ := x.exec("t", p)
	if got := read(t, o); got != "terminal\r\n" {
		t.Errorf("exec with a terminal: %q", got)
	}
}

// reader collects output in the test's own goroutine.
type reader struct {
	c   net.Conn
	got []byte
}

func bufferOf(c net.Conn) *reader { return &reader{c: c} }

func (r *reader) until(t *testing.T, want string) {
	t.Helper()
	_ = r.c.SetReadDeadline(time.Now().Add(20 * time.Second))
	b := make([]byte, 4096)
	for !bytes.Contains(r.got, []byte(want)) {
		n, err := r.c.Read(b)
		r.got = append(r.got, b[:n]...)
		if err != nil && !bytes.Contains(r.got, []byte(want)) {
			t.Fatalf("%q before %q: %v", r.got, want, err)
		}
	}
}

func testSignals(t *testing.T, g *guest) {
	// An init without a handler ignores TERM, as on any Linux.
	b := g.create(t, "sig", spec("sleep", "1000")).start()
	if err := b.signal("", 15); err != nil {
		t.Fatal(err)
	}
	_, out, _ := b.exec("alive", process("echo", "alive"))
	if got := read(t, out); got != "alive\n" {
		t.Errorf("after TERM: %q", got)
	}
	if code := b.wait("alive"); code != 0 {
		t.Errorf("status %d", code)
	}
	b.exec("e", process("sleep", "1000"))
	if err := b.signal("e", 15); err != nil {
		t.Fatal(err)
	}
	if code := b.wait("e"); code != 143 {
		t.Errorf("exec killed by TERM: status %d", code)
	}
	if err := b.signal("", 9); err != nil {
		t.Fatal(err)
	}
	if code := b.wait(""); code != 137 {
		t.Errorf("KILL: status %d", code)
	}
	if err := b.signal(b.id, 15); status.Code(err) != codes.NotFound {
		t.Errorf("signal to a finished process: %v", err)
	}
	h := g.create(t, "sig2", spec("sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done")).start()
	bufferOf(h.out).until(t, "ready")
	if err := h.signal("", 15); err != nil {
		t.Fatal(err)
	}
	if code := h.wait(""); code != 9 {
		t.Errorf("handled TERM: status %d", code)
	}
}

// testGrandchild: a descendant that holds stdout delays the stream's end, not the exit.
func testGrandchild(t *testing.T, g *guest) {
	b := g.create(t, "grand", spec("sleep", "1000")).start()
	start := time.Now()
	_, out, _ := b.exec("e", process("sh", "-c", "(sleep 3; echo late) & echo early; exit 4"))
	if code := b.wait("e"); code != 4 {
		t.Errorf("status %d", code)
	}
	if took := time.Since(start); took > 2500*time.Millisecond {
		t.Errorf("the exit took %v: it waited for the descendant", took)
	}
	if got := read(t, out); got != "early\nlate\n" {
		t.Errorf("stdout %q", got)
	}
}

// testDigest: 64 MiB through stdout, every byte before the container's removal returns.
func testDigest(t *testing.T, g *guest) {
	const size = 64 << 20
	b := g.create(t, "digest", spec("dd", "if=/dev/zero", "bs=64k", "count=1024"))
	b.start()
	sum := make(chan [32]byte, 1)
	n := make(chan int64, 1)
	start := time.Now()
	go func() {
		h := sha256.New()
		k, _ := io.Copy(h, b.out)
		n <- k
		sum <- [32]byte(h.Sum(nil))
	}()
	if code := b.wait(""); code != 0 {
		t.Errorf("status %d", code)
	}
	b.remove()
	if k := <-n; k != size {
		t.Errorf("%d bytes of %d", k, size)
	}
	if got, want := <-sum, sha256.Sum256(make([]byte, size)); got != want {
		t.Error("the digest differs")
	}
	t.Logf("64 MiB in %v: %.0f MB/s", time.Since(start), size/1e6/time.Since(start).Seconds())
}

// TestOlderHost boots a guest as a runtime without streams does: stdio by
// request, the log and the debug console on their ports.
func TestOlderHost(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a virtual machine")
	}
	g := startGuest(t, "agent.log=debug agent.log_vport=1025 agent.debug_console agent.debug_console_vport=1026 agent.bogus=1 agent.hotplug_timeout=x")
	t.Run("polling", func(t *testing.T) { testPolling(t, g) })
	t.Run("log", func(t *testing.T) {
		c, err := g.dev.Dial(bounded(t), protocols.LogPort)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		r := bufferOf(c)
		r.until(t, "agent.hotplug_timeout=x")
		r.until(t, "agent ready")
		r.until(t, "CreateContainer")
		line, _, _ := strings.Cut(string(r.got), "\n")
		var entry struct{ TS, Level, Msg string }
		if err := json.Unmarshal([]byte(line), &entry); err != nil || entry.TS == "" || entry.Level != "warn" || entry.Msg == "" {
			t.Errorf("log line %q: %v", line, err)
		}
		d, err := g.GetDiagnosticData(bounded(t), &agentpb.GetDiagnosticDataRequest{LogType: "agent-log"})
		if err != nil || !strings.Contains(d.Data, "agent ready") {
			t.Errorf("kept log: %q, %v", d.GetData(), err)
		}
	})
	t.Run("console", func(t *testing.T) {
		c, err := g.dev.Dial(bounded(t), protocols.DebugConsolePort)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte("echo $((40+2)) $$-\n")); err != nil {
			t.Fatal(err)
		}
		r := bufferOf(c)
		r.until(t, "42 ")
		testEngineSealed(t, g, func(line string) {
			if _, err := fmt.Fprintln(c, line); err != nil {
				t.Fatal(err)
			}
		}, r)
		if _, err := c.Write([]byte("exit\n")); err != nil {
			t.Fatal(err)
		}
		read(t, c) // ends with the shell
	})
}

// testEngineSealed: the engine runs from the agent's one copy of it, and who has got
// hold of that while a container was made cannot write to it when it runs no more.
// say writes a line to a shell in the guest; r is what comes back, echo included.
func testEngineSealed(t *testing.T, g *guest, say func(string), r *reader) {
	b := &box{t: t, g: g, id: "sealed"}
	made, err := g.CreateContainer(bounded(t), &agentpb.CreateContainerRequest{ContainerId: b.id, OCI: spec("sleep", "1000")})
	if err != nil {
		t.Fatal(err)
	}
	defer b.remove()
	say(fmt.Sprintf("PATH=/test/rootfs/bin; readlink /proc/%d/exe; exec 3</proc/%[1]d/exe && echo h''eld", made.Pid))
	r.until(t, "/memfd:oci-engine (deleted)")
	r.until(t, "held")
	b.start()
	say("(echo x >>/proc/self/fd/3) || echo re''fused")
	r.until(t, "refused")
}

func testPolling(t *testing.T, g *guest) {
	b := &box{t: t, g: g, id: "poll"}
	if _, err := g.CreateContainer(bounded(t), &agentpb.CreateContainerRequest{ContainerId: b.id, OCI: spec("sh", "-c", "cat; echo err >&2; exit 3")}); err != nil {
		t.Fatal(err)
	}
	defer b.remove()
	b.start()
	data := bytes.Repeat([]byte("polled\n"), 5000)
	r, err := g.WriteStdin(bounded(t), &agentpb.WriteStreamRequest{ContainerId: b.id, ExecId: b.id, Data: data})
	if err != nil || int(r.Len) != len(data) {
		t.Fatal(r, err)
	}
	if _, err := g.CloseStdin(bounded(t), &agentpb.CloseStdinRequest{ContainerId: b.id, ExecId: b.id}); err != nil {
		t.Fatal(err)
	}
	if code := b.wait(""); code != 3 { // before anything was read: nothing may be lost
		t.Errorf("status %d", code)
	}
	poll := func(f func(context.Context, *agentpb.ReadStreamRequest) (*agentpb.ReadStreamResponse, error)) (out []byte) {
		for {
			r, err := f(bounded(t), &agentpb.ReadStreamRequest{ContainerId: b.id, ExecId: b.id, Len: 32 << 10})
			if err != nil {
				t.Fatal(err)
			}
			if len(r.Data) == 0 {
				return out
			}
			out = append(out, r.Data...)
		}
	}
	if got := poll(g.ReadStdout); !bytes.Equal(got, data) {
		t.Errorf("stdout: %d bytes of %d", len(got), len(data))
	}
	if got := poll(g.ReadStderr); string(got) != "err\n" {
		t.Errorf("stderr %q", got)
	}
}
