// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/boot"
	"github.com/kata-v2/kata/guest-agent/engine"
	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/guest-agent/reaper"
	"github.com/kata-v2/kata/guest-agent/storage"
	"github.com/kata-v2/kata/guest-agent/streams"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// world is the engine and the cgroups of a pod under test: processes are real
// children, everything else is pretended.
type world struct {
	reaper *reaper.Reaper

	mu     sync.Mutex
	fail   map[string]error // by step
	log    []string
	groups map[string]*group
	specs  map[string]*specs.Spec
	gates  map[string]*os.File         // of created containers: a line lets the program run
	slow   func(context.Context) error // of launches, when set
}

func (w *world) step(name string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.log = append(w.log, name)
	return w.fail[name]
}

func (w *world) did(name string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Contains(w.log, name)
}

func (w *world) spawn(g *group, args []string, stdio []uintptr) (*engine.Process, error) {
	launch := w.reaper.Launch()
	defer launch.Done()
	path := "/bin/sh"
	pid, err := syscall.ForkExec(path, append([]string{"sh", "-c"}, strings.Join(args, " ")), &syscall.ProcAttr{Env: os.Environ(), Files: stdio})
	if err != nil {
		return nil, err
	}
	p := engine.NewProcess(pid, launch.Claim(pid), nil)
	g.add(pid)
	return p, nil
}

func (w *world) Create(_ context.Context, c engine.Create) (*engine.Process, error) {
	if err := w.step("create"); err != nil {
		return nil, err
	}
	w.mu.Lock()
	w.specs[c.ID] = c.Spec
	g := w.groups[c.ID]
	w.mu.Unlock()
	r, gate, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	args := append([]string{"read gate <&3; exec 3<&-;"}, c.Spec.Process.Args...)
	p, err := w.spawn(g, args, append(slices.Clone(c.Stdio[:3]), r.Fd()))
	if err != nil {
		return nil, errors.Join(err, gate.Close())
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.gates[c.ID] = gate
	return p, nil
}

func (w *world) Start(_ context.Context, id string, _ bool) error {
	if err := w.step("start"); err != nil {
		return err
	}
	w.mu.Lock()
	gate := w.gates[id]
	w.mu.Unlock()
	_, err := gate.WriteString("\n")
	return err
}

func (w *world) Exec(ctx context.Context, e engine.Exec) (*engine.Process, error) {
	if err := w.step("exec"); err != nil {
		return nil, err
	}
	if w.slow != nil {
		if err := w.slow(ctx); err != nil {
			return nil, err
		}
	}
	w.mu.Lock()
	g := w.groups[e.ID]
	w.mu.Unlock()
	return w.spawn(g, e.Spec.Args, e.Stdio)
}

func (w *world) Delete(_ context.Context, id string, _ bool) error {
	w.mu.Lock()
	w.gates[id].Close() // of nil it is an error that nobody minds
	w.mu.Unlock()
	return w.step("delete")
}

// group pretends to be a cgroup: it knows the pids that were started in it.
type group struct {
	w    *world
	mu   sync.Mutex
	pids []int
}

func (g *group) add(pid int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.pids = append(g.pids, pid)
}

func (g *group) alive() (out []int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range g.pids {
		if unix.Kill(p, 0) == nil {
			out = append(out, p)
		}
	}
	return out
}

func (g *group) Open() (*os.File, error) { return os.Open("/") }
func (g *group) Procs() ([]int, error)   { return g.alive(), nil }
func (g *group) Kill() error {
	for _, p := range g.alive() {
		_ = unix.Kill(p, unix.SIGKILL)
	}
	return g.w.step("kill")
}
func (g *group) Freeze(_ context.Context, on bool) error { return g.w.step("freeze") }
func (g *group) WaitEmpty(ctx context.Context) error {
	for len(g.alive()) > 0 {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
	return nil
}
func (g *group) WatchOOM(ctx context.Context, f func()) error {
	if g.w.did("oom") {
		f()
	}
	<-ctx.Done()
	return nil
}
func (g *group) Apply(*specs.LinuxResources) error          { return g.w.step("limits") }
func (g *group) SetDevices([]specs.LinuxDeviceCgroup) error { return nil }
func (g *group) Stats() (*agentpb.CgroupStats, error)       { return &agentpb.CgroupStats{}, nil }
func (g *group) Remove() error                              { return g.w.step("rmgroup") }

func newPod(t *testing.T) (*Pod, *world) {
	t.Helper()
	w := &world{reaper: reaper.New(), fail: map[string]error{}, groups: map[string]*group{}, specs: map[string]*specs.Spec{}, gates: map[string]*os.File{}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); w.reaper.Run(ctx) }()
	dir := t.TempDir()
	mods, err := boot.OpenModules(dir)
	if err != nil {
		t.Fatal(err)
	}
	params := boot.DefaultParams()
	params.StreamsAsked = true
	p := New(Config{
		Engine: w, Hub: streams.NewHub(), Modules: mods, Params: params, Log: slog.New(slog.DiscardHandler),
		Storage: storage.NewManager(mods, nil, dir), RunDir: dir, NSDir: dir + "/ns", SysctlDir: dir + "/sysctl",
		Group: func(id string) (Group, error) {
			if err := w.step("group"); err != nil {
				return nil, err
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			w.groups[id] = &group{w: w}
			return w.groups[id], nil
		},
	})
	t.Cleanup(func() {
		for _, c := range p.Containers() {
			if err := p.RemoveContainer(context.Background(), c.ID); err != nil {
				t.Error(err)
			}
		}
		cancel()
		<-done
	})
	return p, w
}

func request(id, script string) *agentpb.CreateContainerRequest {
	return &agentpb.CreateContainerRequest{ContainerId: id, OCI: &agentpb.Spec{
		Process: &agentpb.Process{Args: []string{script}}, Root: &agentpb.Root{Path: "/"},
		Linux: &agentpb.Linux{Resources: &agentpb.LinuxResources{}, Namespaces: []*agentpb.LinuxNamespace{{Type: "pid"}}},
	}}
}

func bound(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func createErr(t *testing.T, p *Pod, req *agentpb.CreateContainerRequest) error {
	t.Helper()
	_, err := p.CreateContainer(bound(t), req)
	return err
}

func execErr(t *testing.T, c *Container, id string, proc *agentpb.Process, ports Ports) error {
	t.Helper()
	_, err := c.Exec(bound(t), id, proc, ports)
	return err
}

func run(t *testing.T, p *Pod, id, script string) *Container {
	t.Helper()
	if err := createErr(t, p, request(id, script)); err != nil {
		t.Fatal(err)
	}
	c, err := p.Container(id)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(bound(t)); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestLife(t *testing.T) {
	p, w := newPod(t)
	c := run(t, p, "a", "exit 3")
	if code, _, err := c.Wait(bound(t), ""); code != 3 || err != nil {
		t.Fatal(code, err)
	}
	if err := c.expect(Stopped); err != nil {
		t.Error(err)
	}
	if err := c.Signal("a", unix.SIGTERM); fault.KindOf(err) != fault.NotFound {
		t.Errorf("signal to a finished process: %v", err)
	}
	if err := c.Signal("", unix.SIGKILL); fault.KindOf(err) != fault.NotFound {
		t.Errorf("kill of a finished container: %v", err)
	}
	if err := p.RemoveContainer(bound(t), "a"); err != nil {
		t.Fatal(err)
	}
	if !w.did("delete") || !w.did("rmgroup") {
		t.Errorf("steps %v", w.log)
	}
	if err := p.RemoveContainer(bound(t), "a"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("removed twice: %v", err)
	}
	if _, err := os.Stat(filepath.Join(p.cfg.RunDir, "a")); err == nil {
		t.Error("the bundle is left")
	}
}

func TestFailedCreateLeavesNothing(t *testing.T) {
	boom := errors.New("boom")
	for _, step := range []string{"group", "create", "limits"} {
		t.Run(step, func(t *testing.T) {
			p, w := newPod(t)
			w.fail[step] = boom
			vol := t.TempDir() + "/v"
			req := request("a", "exec sleep 100")
			req.Storages = []*agentpb.Storage{{Driver: "local", MountPoint: vol}}
			if err := createErr(t, p, req); !errors.Is(err, boom) || !strings.Contains(err.Error(), "a") {
				t.Fatalf("got %v", err)
			}
			for id, g := range w.groups {
				if len(g.alive()) > 0 {
					t.Errorf("processes of %s are left", id)
				}
			}
			if step != "group" && !w.did("rmgroup") {
				t.Error("the cgroup is left")
			}
			if _, err := os.Stat(filepath.Join(p.cfg.RunDir, "a")); err == nil {
				t.Error("the bundle is left")
			}
			delete(w.fail, step)
			run(t, p, "a", "exec sleep 100") // the id is free again
		})
	}
}

func TestWrongState(t *testing.T) {
	p, w := newPod(t)
	if err := createErr(t, p, request("a", "exec sleep 100")); err != nil {
		t.Fatal(err)
	}
	c, err := p.Container("a")
	if err != nil {
		t.Fatal(err)
	}
	proc := &agentpb.Process{Args: []string{"true"}}
	wrong := func(what string, err error) {
		t.Helper()
		if fault.KindOf(err) != fault.FailedPrecondition {
			t.Errorf("%s: %v", what, err)
		}
	}
	wrong("pause before start", c.Pause(bound(t)))
	w.mu.Lock()
	w.fail["start"] = errors.New("boom")
	w.mu.Unlock()
	if err := c.Start(bound(t)); err == nil {
		t.Error("start did not fail")
	}
	w.mu.Lock()
	delete(w.fail, "start")
	w.mu.Unlock()
	if err := c.Start(bound(t)); err != nil {
		t.Errorf("start after a failed one: %v", err)
	}
	wrong("start twice", c.Start(bound(t)))
	wrong("resume of a running one", c.Resume(bound(t)))
	if err := c.Pause(bound(t)); err != nil {
		t.Fatal(err)
	}
	wrong("exec while paused", execErr(t, c, "e", proc, Ports{}))
	if err := c.Resume(bound(t)); err != nil {
		t.Fatal(err)
	}
	if fault.KindOf(execErr(t, c, "", proc, Ports{})) != fault.InvalidArgument {
		t.Error("exec without a name")
	}
	if fault.KindOf(createErr(t, p, request("a", "true"))) != fault.AlreadyExists {
		t.Error("the same id twice")
	}
	for _, id := range []string{"", "../x", ".x", "a/b", "shared", "sandbox", "-x"} {
		if fault.KindOf(createErr(t, p, request(id, "true"))) != fault.InvalidArgument {
			t.Errorf("id %q accepted", id)
		}
	}
}

func TestExec(t *testing.T) {
	p, w := newPod(t)
	c := run(t, p, "a", "exec sleep 100")
	pr, err := c.Exec(bound(t), "e", &agentpb.Process{Args: []string{"exit 4"}}, Ports{})
	if err != nil {
		t.Fatal(err)
	}
	if pr.PID() <= 0 || pr.PID() == c.Init().PID() {
		t.Errorf("process number %d", pr.PID())
	}
	if fault.KindOf(execErr(t, c, "e2", &agentpb.Process{}, Ports{})) != fault.InvalidArgument {
		t.Error("exec without arguments")
	}
	if code, _, err := c.Wait(bound(t), "e"); code != 4 || err != nil {
		t.Error(code, err)
	}
	w.mu.Lock()
	w.fail["exec"] = errors.New("boom")
	w.mu.Unlock()
	if err := execErr(t, c, "f", &agentpb.Process{Args: []string{"true"}}, Ports{}); err == nil {
		t.Error("no error")
	}
	c.mu.Lock()
	_, taken := c.execs["f"]
	c.mu.Unlock()
	if taken {
		t.Error("a failed exec keeps its name")
	}
}

func TestRemoveWhileRunning(t *testing.T) {
	p, _ := newPod(t)
	c := run(t, p, "a", "exec sleep 100")
	if err := execErr(t, c, "e", &agentpb.Process{Args: []string{"exec sleep 100"}}, Ports{}); err != nil {
		t.Fatal(err)
	}
	type result struct {
		code int
		err  error
	}
	waited := make(chan result, 2)
	for _, id := range []string{"", "e"} {
		go func() { code, _, err := c.Wait(context.Background(), id); waited <- result{code, err} }()
	}
	if err := p.RemoveContainer(bound(t), "a"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		// A waiter that asked after the removal finds no process; none hangs.
		if r := <-waited; r.err == nil && r.code != 137 || r.err != nil && fault.KindOf(r.err) != fault.NotFound {
			t.Errorf("%+v", r)
		}
	}
}

func TestExecRacesWithRemoval(t *testing.T) {
	p, _ := newPod(t)
	for range 20 {
		c := run(t, p, "a", "exec sleep 100")
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = c.Exec(context.Background(), "e", &agentpb.Process{Args: []string{"exec sleep 100"}}, Ports{}) // either way is right
		}()
		if err := p.RemoveContainer(bound(t), "a"); err != nil {
			t.Fatal(err)
		}
		<-done
		if left := c.group.(*group).alive(); len(left) > 0 {
			t.Fatalf("processes left: %v", left)
		}
	}
}

// Containers that share a PID namespace join one that none of them holds.
func TestSharedPID(t *testing.T) {
	p, w := newPod(t)
	started, gone := 0, make(chan reaper.Status, 1)
	p.cfg.PIDHolder = func(context.Context) (int, <-chan reaper.Status, error) {
		started++
		if started == 1 {
			return 0, nil, errors.New("no memory")
		}
		return os.Getpid() + started, gone, nil
	}
	create := func(id string) string {
		t.Helper()
		req := request(id, "exec sleep 100")
		req.SandboxPidns = true
		if err := createErr(t, p, req); err != nil {
			t.Fatal(err)
		}
		return w.specs[id].Linux.Namespaces[0].Path
	}
	req := request("x", "exec sleep 100")
	req.SandboxPidns = true
	if err := createErr(t, p, req); err == nil || !strings.Contains(err.Error(), "no memory") {
		t.Errorf("a holder that does not start: %v", err)
	}
	first := create("a")
	if first != pidNSPath(os.Getpid()+2) || create("b") != first {
		t.Errorf("paths %q and another", first)
	}
	if err := p.RemoveContainer(bound(t), "a"); err != nil {
		t.Fatal(err)
	}
	if got := create("c"); got != first {
		t.Errorf("after the end of one container: %q, before %q", got, first)
	}
	gone <- reaper.Status{Code: 137}
	if got := create("d"); got == first || started != 3 {
		t.Errorf("joined a dead namespace: %q", got)
	}
}

// A container whose PID namespace goes on ends with its first process all the same.
func TestSharedPIDEndsAll(t *testing.T) {
	p, _ := newPod(t)
	p.cfg.PIDHolder = func(context.Context) (int, <-chan reaper.Status, error) { return os.Getpid(), nil, nil }
	req := request("a", "exec sleep 100")
	req.SandboxPidns = true
	if err := createErr(t, p, req); err != nil {
		t.Fatal(err)
	}
	c, err := p.Container("a")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(bound(t)); err != nil {
		t.Fatal(err)
	}
	if err := execErr(t, c, "e", &agentpb.Process{Args: []string{"exec sleep 100"}}, Ports{}); err != nil {
		t.Fatal(err)
	}
	if err := c.Signal("a", unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code, _, err := c.Wait(bound(t), "e"); code != 137 || err != nil {
		t.Errorf("the other process: %d, %v", code, err)
	}
}

// A pause container's PID namespace is the one to share.
func TestSharedPIDOfPause(t *testing.T) {
	p, w := newPod(t)
	pause := request("pause", "exec sleep 100")
	pause.OCI.Annotations = map[string]string{"io.kubernetes.cri.container-type": "sandbox"}
	if err := createErr(t, p, pause); err != nil {
		t.Fatal(err)
	}
	c, err := p.Container("pause")
	if err != nil {
		t.Fatal(err)
	}
	req := request("a", "exec sleep 100")
	req.SandboxPidns = true
	if err := createErr(t, p, req); err != nil || w.specs["a"].Linux.Namespaces[0].Path != pidNSPath(c.Init().PID()) {
		t.Errorf("joined %q, %v; want that of process %d", w.specs["a"].Linux.Namespaces, err, c.Init().PID())
	}
}

func TestOOM(t *testing.T) {
	p, w := newPod(t)
	_ = w.step("oom")
	run(t, p, "a", "exec sleep 100")
	if id, err := p.NextOOM(bound(t)); id != "a" || err != nil {
		t.Error(id, err)
	}
}

func TestSandbox(t *testing.T) {
	p, _ := newPod(t)
	req := &agentpb.CreateSandboxRequest{Dns: []string{"192.0.2.1", "search example.test"}}
	if err := p.CreateSandbox(bound(t), req); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(p.cfg.RunDir, "sandbox", "resolv.conf"))
	if err != nil || string(b) != "nameserver 192.0.2.1\nsearch example.test\n" {
		t.Errorf("%q, %v", b, err)
	}
	if err := p.CreateSandbox(bound(t), req); fault.KindOf(err) != fault.AlreadyExists {
		t.Errorf("twice: %v", err)
	}
	run(t, p, "a", "exec sleep 100")
	if err := p.Destroy(bound(t)); err != nil || len(p.Containers()) != 0 {
		t.Error(err)
	}
}

// TestDestroyEnded: a container that has ended is not ended again.
func TestDestroyEnded(t *testing.T) {
	p, w := newPod(t)
	c := run(t, p, "a", "exit 0")
	if _, _, err := c.Wait(bound(t), ""); err != nil {
		t.Fatal(err)
	}
	if err := p.Destroy(bound(t)); err != nil || len(p.Containers()) != 0 {
		t.Error(err)
	}
	if w.did("kill") {
		t.Error("its cgroup was killed")
	}
}

func TestGuestSysctlsAndUser(t *testing.T) {
	p, w := newPod(t)
	req := request("a", "true")
	req.OCI.Linux.Sysctl = map[string]string{"net.core.x": "5"}
	if err := createErr(t, p, req); fault.KindOf(err) != fault.FailedPrecondition {
		t.Errorf("no such sysctl: %v", err)
	}
	if err := os.MkdirAll(filepath.Join(p.cfg.SysctlDir, "net/core"), 0o755); err != nil {
		t.Fatal(err)
	}
	req.StringUser = &agentpb.StringUser{Uid: "7", Gid: "8"}
	if err := createErr(t, p, req); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(filepath.Join(p.cfg.SysctlDir, "net/core/x")); string(b) != "5" {
		t.Errorf("sysctl %q", b)
	}
	if u := w.specs["a"].Process.User; u.UID != 7 || u.GID != 8 {
		t.Errorf("user %+v", u)
	}
	req = request("b", "true")
	req.StringUser = &agentpb.StringUser{Uid: "root"}
	if err := createErr(t, p, req); fault.KindOf(err) != fault.InvalidArgument {
		t.Errorf("a name: %v", err)
	}
}
