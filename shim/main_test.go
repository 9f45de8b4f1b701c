// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/hypervisortest"
	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/sandbox"
	"github.com/kata-v2/kata/sandbox/agentclient/agenttest"
	"github.com/kata-v2/kata/sandbox/ledger"
	"github.com/kata-v2/kata/sandbox/storage/storagetest"
)

func TestMain(m *testing.M) { os.Exit(storagetest.Main(m)) }

// limit bounds whatever a test waits for that should happen at once.
const limit = 5 * time.Second

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func bounded(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	return ctx
}

type logWriter struct{ t *testing.T }

func (w logWriter) Write(b []byte) (int, error) { w.t.Logf("%s", b); return len(b), nil }

func logger(t *testing.T) *slog.Logger { return slog.New(slog.NewTextHandler(logWriter{t}, nil)) }

// containerd is the part of it that takes events.
type containerd struct {
	t    *testing.T
	path string
	got  chan *types.Envelope

	mu     sync.Mutex
	server *ttrpc.Server // guarded by mu; nil while containerd is down
	done   chan struct{} // guarded by mu
}

func newContainerd(t *testing.T) *containerd {
	c := &containerd{t: t, path: filepath.Join(t.TempDir(), "ttrpc.sock"), got: make(chan *types.Envelope, 10_000)}
	t.Cleanup(c.down)
	return c
}

func (c *containerd) Forward(_ context.Context, r *eventsapi.ForwardRequest) (*emptypb.Empty, error) {
	c.got <- r.Envelope
	return &emptypb.Empty{}, nil
}

func (c *containerd) up() {
	c.t.Helper()
	l, err := net.Listen("unix", c.path)
	must(c.t, err)
	server, err := ttrpc.NewServer()
	must(c.t, err)
	eventsapi.RegisterTTRPCEventsService(server, c)
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(context.Background(), l) }()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.server, c.done = server, done
}

func (c *containerd) down() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.server != nil {
		_ = c.server.Close()
		<-c.done
		c.server = nil
	}
}

// next is the next event.
func (c *containerd) next() *types.Envelope {
	c.t.Helper()
	select {
	case e := <-c.got:
		return e
	case <-time.After(2 * limit):
		c.t.Fatal("the event does not come")
		return nil
	}
}

// pod is a service over a sandbox with a fake machine, reached over ttrpc as
// containerd does.
type pod struct {
	t          *testing.T
	agent      *agenttest.Agent
	containerd *containerd
	svc        *service
	sb         *sandbox.Sandbox
	v2, v3     *ttrpc.Client
	dir        string
}

func newPod(t *testing.T) *pod {
	t.Helper()
	p := &pod{t: t, agent: agenttest.New(), containerd: newContainerd(t), dir: t.TempDir()}
	p.containerd.up()
	kernel := filepath.Join(p.dir, "kernel")
	must(t, os.WriteFile(kernel, nil, 0o644))
	daemon, err := filepath.Abs("../sandbox/testdata/virtiofsd")
	must(t, err)
	load := config.LoadOptions{Body: fmt.Appendf(nil,
		"[hypervisor.qemu]\nkernel = %q\ninitrd = %q\nvirtio_fs_daemon = %q\n", kernel, kernel, daemon)}
	cfg, _, err := config.Load(load)
	must(t, err)
	fake := &hypervisortest.Fake{Guest: p.agent.Guest}
	led, err := ledger.Create(filepath.Join(p.dir, "state"), "key", ledger.Meta{Sandbox: "pod"})
	must(t, err)
	p.sb = sandbox.New(sandbox.Options{
		ID: "pod", Key: "key", Config: cfg, Hypervisor: fake, Ledger: led, HostCPUs: 1, Log: logger(t),
	})
	pub := newPublisher("ns", "unix://"+p.containerd.path, logger(t))
	p.svc = newService(p.sb, pub, logger(t))
	server, err := ttrpc.NewServer()
	must(t, err)
	register(server, p.svc)
	registerSandbox(server, &sandboxService{
		svc: p.svc, sb: p.sb, log: logger(t), load: load, files: filepath.Join(led.Dir(), "etc"),
		hypervisor: func(*config.Config) hypervisor.Hypervisor { return fake },
	})
	l, err := net.Listen("unix", filepath.Join(p.dir, "shim.sock"))
	must(t, err)
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(context.Background(), l) }()
	p.v2, p.v3 = p.connect(l), p.connect(l)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		for what, err := range map[string]error{"sandbox": p.sb.Stop(ctx), "service": p.svc.close(ctx), "publisher": pub.close(ctx)} {
			if err != nil {
				t.Errorf("end of the %s: %v", what, err)
			}
		}
		_ = p.v2.Close()
		_ = p.v3.Close()
		_ = server.Close()
		<-served
		if err := led.Close(); err != nil {
			t.Errorf("ledger: %v", err)
		}
	})
	return p
}

func (p *pod) connect(l net.Listener) *ttrpc.Client {
	c, err := net.Dial("unix", l.Addr().String())
	must(p.t, err)
	return ttrpc.NewClient(c)
}

// call makes one call of the Task service by the name of either version, with
// the error's kind as containerd sees it.
func (p *pod) call(service, method string, req, resp any) error {
	p.t.Helper()
	client := p.v3
	if service == taskV2 {
		client = p.v2
	}
	err := client.Call(bounded(p.t), service, method, req, resp)
	return errgrpc.ToNative(err)
}

func (p *pod) tasks() task.TTRPCTaskService { return task.NewTTRPCTaskClient(p.v3) }

// bundle is one that runs an agenttest program.
func (p *pod) bundle(id string, args ...string) string {
	p.t.Helper()
	dir := filepath.Join(p.t.TempDir(), id)
	must(p.t, os.MkdirAll(filepath.Join(dir, "rootfs"), 0o755))
	spec := specs.Spec{
		Version: specs.Version, Root: &specs.Root{Path: "rootfs"}, Process: &specs.Process{Args: args, Cwd: "/"},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.NetworkNamespace}}},
	}
	data, err := json.Marshal(spec)
	must(p.t, err)
	must(p.t, os.WriteFile(filepath.Join(dir, "config.json"), data, 0o644))
	return dir
}

func (p *pod) create(id string, args ...string) *task.CreateTaskResponse {
	p.t.Helper()
	r, err := p.tasks().Create(bounded(p.t), &task.CreateTaskRequest{ID: id, Bundle: p.bundle(id, args...)})
	must(p.t, err)
	return r
}

func (p *pod) start(id, exec string) {
	p.t.Helper()
	_, err := p.tasks().Start(bounded(p.t), &task.StartRequest{ID: id, ExecID: exec})
	must(p.t, err)
}

func (p *pod) wait(id, exec string) *task.WaitResponse {
	p.t.Helper()
	r, err := p.tasks().Wait(bounded(p.t), &task.WaitRequest{ID: id, ExecID: exec})
	must(p.t, err)
	return r
}

func (p *pod) delete(id, exec string) *task.DeleteResponse {
	p.t.Helper()
	r, err := p.tasks().Delete(bounded(p.t), &task.DeleteRequest{ID: id, ExecID: exec})
	must(p.t, err)
	return r
}
