// SPDX-License-Identifier: Apache-2.0

package template

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/kata-v2/kata/hypervisor"
)

// base starts machines that do nothing.
type base struct {
	restore error // of machines that are restored

	mu      sync.Mutex
	started []hypervisor.Config // guarded by mu
}

func (b *base) Start(ctx context.Context, c hypervisor.Config) (hypervisor.VM, error) {
	b.mu.Lock()
	b.started = append(b.started, c)
	b.mu.Unlock()
	c.CloseDevices()
	if c.MemoryFilled != nil {
		if err := c.MemoryFilled(ctx); err != nil {
			return nil, err
		}
	}
	if c.Restore != nil && b.restore != nil {
		return nil, b.restore
	}
	return &vm{c: c, done: make(chan struct{})}, nil
}

// restored counts the machines that were cloned and booted.
func (b *base) restored() (cloned, booted int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.started {
		if c.Restore != nil {
			cloned++
		} else {
			booted++
		}
	}
	return cloned, booted
}

type vm struct {
	hypervisor.VM
	c    hypervisor.Config
	once sync.Once
	done chan struct{}
}

func (v *vm) WaitReady(context.Context) error { return nil }
func (v *vm) Stop(context.Context) error      { v.once.Do(func() { close(v.done) }); return nil }
func (v *vm) Done() <-chan struct{}           { return v.done }
func (v *vm) Info() hypervisor.Info           { return hypervisor.Info{} }
func (v *vm) Save(ctx context.Context, state *os.File) error {
	return save(ctx, "", v.c.Memory, state)
}

// pods is a hypervisor of a pod, its base and its log.
func pods(t *testing.T, s *Store) (*Hypervisor, *base, *bytes.Buffer) {
	b, log := &base{}, &bytes.Buffer{}
	return &Hypervisor{Base: b, Store: s, Key: testKey("a"), Log: slog.New(slog.NewTextHandler(log, nil))}, b, log
}

func newStore(t *testing.T) *Store { return &Store{Dir: filepath.Join(t.TempDir(), "templates")} }

func podConfig(t *testing.T) hypervisor.Config {
	kernel := filepath.Join(t.TempDir(), "kernel")
	must(t, os.WriteFile(kernel, []byte("kernel"), 0o600))
	return hypervisor.Config{ID: "pod", Kernel: kernel, CPUs: 1, MaxCPUs: 2, MemoryBytes: memorySize, HotplugPorts: 4, ReadyParam: "ready"}
}

// The first pod boots, and its template is made afterwards; the next is a clone.
func TestFirstAndSecondPod(t *testing.T) {
	s, c := newStore(t), podConfig(t)
	ctx := context.Background()
	h, b, log := pods(t, s)
	_, err := h.Start(ctx, c)
	must(t, err)
	if cloned, booted := b.restored(); cloned != 0 || booted != 1 {
		t.Fatalf("%d cloned, %d booted", cloned, booted)
	}
	if !h.Wanted() || h.Wanted() {
		t.Error("a template that was not found is to be wanted once")
	}
	must1[string](t)(h.Make(ctx, c))
	must1[string](t)(h.Make(ctx, c)) // nothing more to do
	if saved := b.started[1]; saved.Vsock != hypervisor.VsockSerial || saved.ReadyParam != "" || saved.Memory == nil || saved.MemoryPrivate ||
		!strings.Contains(strings.Join(saved.KernelParams, " "), "agent.channel=") {
		t.Errorf("the template's machine is %+v", saved)
	}
	if strings.Contains(log.String(), "WARN") {
		t.Errorf("a first pod warns: %s", log)
	}
	h, b, _ = pods(t, s)
	v, err := h.Start(ctx, c)
	must(t, err)
	got := b.started[0]
	if got.Restore == nil || !got.MemoryPrivate || got.ID != "pod" || got.Vsock != hypervisor.VsockSerial {
		t.Errorf("the second pod's machine is %+v", got)
	}
	must(t, v.Stop(ctx))
	if h.Wanted() {
		t.Error("a template that was found is wanted")
	}
	if cloned, booted := b.restored(); cloned != 1 || booted != 0 {
		t.Errorf("%d cloned, %d booted", cloned, booted)
	}
}

// Another size is another template; a share gets memory of its own.
func TestWhatTellsTemplatesApart(t *testing.T) {
	s, c := newStore(t), podConfig(t)
	ctx := context.Background()
	h, _, _ := pods(t, s)
	digest, err := h.Make(ctx, c)
	must(t, err)
	for name, change := range map[string]func(*hypervisor.Config){
		"memory":     func(c *hypervisor.Config) { c.MemoryBytes *= 2 },
		"max memory": func(c *hypervisor.Config) { c.MaxMemoryBytes = 1 << 30 },
		"vCPUs":      func(c *hypervisor.Config) { c.CPUs = 2 },
		"parameters": func(c *hypervisor.Config) { c.KernelParams = []string{"x"} },
		"reclaim":    func(c *hypervisor.Config) { c.ReclaimFreed = true },
		"ports":      func(c *hypervisor.Config) { c.HotplugPorts++ },
		"kernel":     func(c *hypervisor.Config) { *c = podConfig(t) },
	} {
		other := c
		change(&other)
		if k, err := h.key(other); err != nil || k.Digest() == digest {
			t.Errorf("another %s: the same template, %v", name, err)
		}
	}
	same := c
	same.ID, same.Dir, same.UID, same.HotplugPorts = "other", "/x", 5, 3
	same.Disks = make([]hypervisor.Disk, 1)
	if k, err := h.key(same); err != nil || k.Digest() != digest {
		t.Errorf("what is the pod's own makes another template, %v", err)
	}
	null, err := os.Open(os.DevNull)
	must(t, err)
	c.Shares = []hypervisor.Share{{Tag: "x", Conn: null}}
	h, b, _ := pods(t, s)
	_, err = h.Start(ctx, c)
	must(t, err)
	if got := b.started[0]; got.Restore == nil || got.MemoryPrivate || got.MemoryFilled == nil || len(got.Shares) != 1 {
		t.Errorf("a machine with a share is %+v", got)
	}
	c.Shares, c.ShareLater = nil, true
	h, b, _ = pods(t, s)
	_, err = h.Start(ctx, c)
	must(t, err)
	if got := b.started[0]; got.Restore == nil || got.MemoryPrivate || !got.ShareLater {
		t.Errorf("a machine that may get a share is %+v", got)
	}
}

// A template that does not work costs one failed start and one boot.
func TestRestoreFails(t *testing.T) {
	s, c := newStore(t), podConfig(t)
	ctx := context.Background()
	h, b, _ := pods(t, s)
	_, err := h.Make(ctx, c)
	must(t, err)
	b.restore = errors.New("CPU lacks x")
	if _, err := h.Start(ctx, c); !errors.Is(err, ErrRestore) || !errors.Is(err, b.restore) {
		t.Fatalf("Start: %v", err)
	}
	_, err = h.Start(ctx, c)
	must(t, err)
	if cloned, booted := b.restored(); cloned != 1 || booted != 2 { // the template's too
		t.Errorf("%d cloned, %d booted", cloned, booted)
	}
	tpl, err := s.Open(must1[Key](t)(h.key(c)).Digest())
	must(t, err)
	if u := tpl.Users(); len(u) != 0 {
		t.Errorf("the failed start still holds the memory: %v", u)
	}
}

func must1[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T { t.Helper(); must(t, err); return v }
}

// A broken template is one warning and a boot, and is then made anew.
func TestBrokenTemplateBoots(t *testing.T) {
	s, c := newStore(t), podConfig(t)
	ctx := context.Background()
	h, _, _ := pods(t, s)
	digest, err := h.Make(ctx, c)
	must(t, err)
	must(t, os.Truncate(filepath.Join(s.Dir, digest, memoryFile), 1))
	h, b, log := pods(t, s)
	_, err = h.Start(ctx, c)
	must(t, err)
	if cloned, booted := b.restored(); cloned != 0 || booted != 1 {
		t.Errorf("%d cloned, %d booted", cloned, booted)
	}
	if n := strings.Count(log.String(), "level=WARN"); n != 1 || !strings.Contains(log.String(), "bytes, not") {
		t.Errorf("want one warning with the reason: %s", log)
	}
	if !h.Wanted() {
		t.Error("a broken template is not made again")
	}
	must1[string](t)(h.Make(ctx, c))
	_, err = s.Open(digest)
	must(t, err)
}

// Twenty pods at once load the memory once and leave the template as it was.
func TestManyClones(t *testing.T) {
	s, c := newStore(t), podConfig(t)
	ctx := context.Background()
	h, _, _ := pods(t, s)
	digest, err := h.Make(ctx, c)
	must(t, err)
	const n = 20
	vms := make([]hypervisor.VM, n)
	inodes := make([]string, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			h := &Hypervisor{Base: &base{}, Store: s, Key: testKey("a"), Log: slog.New(slog.DiscardHandler)}
			v, err := h.Start(ctx, c)
			if err != nil {
				t.Error(err)
				return
			}
			vms[i] = v
			inodes[i], _ = inode(v.(*vm).c.Memory)
		})
	}
	wg.Wait()
	tpl, err := s.Open(digest)
	must(t, err)
	for i := range n {
		if inodes[i] == "" || inodes[i] != inodes[0] {
			t.Errorf("clone %d has memory %q, the first %q", i, inodes[i], inodes[0])
		}
		must(t, vms[i].Stop(ctx))
	}
	must(t, tpl.Verify())
}
