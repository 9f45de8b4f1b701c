// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/hypervisortest"
	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/sandbox/agentclient"
	"github.com/kata-v2/kata/sandbox/agentclient/agenttest"
	"github.com/kata-v2/kata/sandbox/ledger"
	"github.com/kata-v2/kata/sandbox/storage/storagetest"
)

func TestMain(m *testing.M) { os.Exit(storagetest.Main(m)) }

// limit bounds whatever a test waits for that should happen at once.
const limit = 5 * time.Second

// pod is a sandbox with a fake machine and a fake agent.
type pod struct {
	*Sandbox
	t      *testing.T
	agent  *agenttest.Agent
	fake   *hypervisortest.Fake
	boots  atomic.Int32
	config *config.Config
	log    *slog.Logger
	oom    func(string)
	state  string
}

// newPod makes one; change may set its parts before the sandbox is made. At the
// test's end nothing of it may be left.
func newPod(t *testing.T, change ...func(*pod)) *pod {
	t.Helper()
	dir := t.TempDir()
	wd, err := os.Getwd()
	must(t, err)
	kernel := filepath.Join(dir, "kernel")
	must(t, os.WriteFile(kernel, nil, 0o644))
	p := &pod{t: t, agent: agenttest.New(), state: filepath.Join(dir, "state"), log: logger(t)}
	p.fake = &hypervisortest.Fake{Guest: p.agent.Guest, BeforeStart: func(context.Context, hypervisor.Config) error { return nil }}
	body := fmt.Sprintf("[hypervisor.qemu]\nkernel = %q\ninitrd = %q\nvirtio_fs_daemon = %q\n[factory]\nenable_template = false\n[runtime]\nstate_dir = %q\n",
		kernel, kernel, filepath.Join(wd, "testdata", "virtiofsd"), p.state)
	p.config, _, err = config.Load(config.LoadOptions{Body: []byte(body)})
	must(t, err)
	for _, f := range change {
		f(p)
	}
	before := p.fake.BeforeStart
	p.fake.BeforeStart = func(ctx context.Context, c hypervisor.Config) error {
		p.boots.Add(1)
		return before(ctx, c)
	}
	led, err := ledger.Create(p.state, "key", ledger.Meta{Sandbox: "pod"})
	must(t, err)
	p.Sandbox = New(Options{
		ID: "pod", Key: "key", Config: p.config, Hypervisor: p.fake, Ledger: led, HostCPUs: 2, Log: p.log, OOM: p.oom,
	})
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		if err := p.Stop(ctx); err != nil {
			t.Errorf("Stop: %v", err)
		}
		if left := storagetest.Mounts(t, dir); len(left) > 0 {
			t.Errorf("mounts are left: %v", left)
		}
		if left, err := os.ReadDir(led.Dir()); err != nil || len(left) != 2 {
			t.Errorf("beside the ledger's own two files: %v, %v", left, err)
		}
		if err := led.Close(); err != nil { // finds what was not forgotten
			t.Errorf("ledger: %v", err)
		}
	})
	return p
}

type logWriter struct{ t *testing.T }

func (w logWriter) Write(b []byte) (int, error) { w.t.Logf("%s", b); return len(b), nil }

func logger(t *testing.T) *slog.Logger { return slog.New(slog.NewTextHandler(logWriter{t}, nil)) }

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

// container describes a container that runs an agenttest program.
func (p *pod) container(id string, args ...string) ContainerConfig {
	bundle := filepath.Join(p.t.TempDir(), id)
	must(p.t, os.MkdirAll(filepath.Join(bundle, "rootfs"), 0o755))
	return ContainerConfig{
		ID: id, Bundle: bundle, Stdio: agentclient.StdioWants{Stdin: true, Stdout: true, Stderr: true},
		Spec: &specs.Spec{
			Version: specs.Version, Root: &specs.Root{Path: "rootfs"}, Process: process(args...),
			Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.NetworkNamespace}, {Type: specs.PIDNamespace}}},
		},
	}
}

func process(args ...string) *specs.Process { return &specs.Process{Args: args, Cwd: "/"} }

func (p *pod) create(id string, args ...string) *Container {
	p.t.Helper()
	c, err := p.CreateContainer(bounded(p.t), p.container(id, args...))
	must(p.t, err)
	return c
}

func (p *pod) start(id string, args ...string) *Container {
	p.t.Helper()
	c := p.create(id, args...)
	must(p.t, c.Start(bounded(p.t)))
	return c
}

func (p *pod) exec(c *Container, id string, args ...string) *Process {
	p.t.Helper()
	e, err := c.Exec(id, process(args...), agentclient.StdioWants{Stdin: true, Stdout: true, Stderr: true})
	must(p.t, err)
	return e
}

// exit waits for a process's end.
func exit(t *testing.T, p *Process) Exit {
	t.Helper()
	within(t, p.Done(), "the process's end")
	return p.Exit()
}

func within(t *testing.T, ch <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-ch:
	case <-time.After(limit):
		t.Fatalf("%s does not come", what)
	}
}

// output reads a stream to its end.
func output(t *testing.T, r io.Reader) string {
	t.Helper()
	res := make(chan string, 1)
	go func() {
		data, err := io.ReadAll(r)
		if err != nil {
			data = fmt.Appendf(data, " (%v)", err)
		}
		res <- string(data)
	}()
	select {
	case s := <-res:
		return s
	case <-time.After(limit):
		t.Fatal("the output does not end")
		return ""
	}
}

// kill ends a process of this one's.
func kill(t *testing.T, pid int) {
	t.Helper()
	must(t, syscall.Kill(pid, syscall.SIGKILL))
}

// is checks an error's kind by one of the errdefs functions; nil means success.
func is(t *testing.T, what string, err error, kind func(error) bool) {
	t.Helper()
	if kind == nil && err != nil || kind != nil && !kind(err) {
		t.Errorf("%s: %v", what, err)
	}
}

var errTest = errors.New("the test wants it so")
