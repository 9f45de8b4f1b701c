// SPDX-License-Identifier: Apache-2.0

package template

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/internal/channel"
	"github.com/kata-v2/kata/protocols"
)

// ErrRestore marks the failure of a start from a template: the same start again
// boots a machine, but the files of its shares and network devices are used up.
var ErrRestore = errors.New("start from a template")

// makeTimeout bounds the making of a template.
const makeTimeout = 2 * time.Minute

// Hypervisor starts machines as clones of templates where it can, and boots them
// where it cannot. It is for one pod: after a failure it only boots.
type Hypervisor struct {
	// Base boots and restores.
	Base hypervisor.Hypervisor
	// Store holds the templates.
	Store *Store
	// Key holds what the machines of Base depend on beside their configuration.
	Key Key
	// Log gets one line per event.
	Log *slog.Logger

	releases sync.WaitGroup // of memory, when machines have ended

	mu     sync.Mutex
	failed bool // guarded by mu; no more clones
	wanted bool // guarded by mu; a template was not found
}

// key is that of the machine's template.
func (h *Hypervisor) key(c hypervisor.Config) (Key, error) {
	k := append(Key{}, h.Key...)
	if err := errors.Join(k.AddFile("kernel", c.Kernel), k.AddFile("initrd", c.Initrd)); err != nil {
		return nil, err
	}
	k.Add("kernel parameters", strings.Join(c.KernelParams, " "))
	k.Add("vCPUs", fmt.Sprintf("%d of %d", c.CPUs, c.MaxCPUs))
	k.Add("memory", fmt.Sprintf("%d of %d bytes", c.MemoryBytes, c.MaxMemoryBytes))
	k.Add("hot-plug ports", c.HotplugPorts+len(c.Disks))
	k.Add("reclaim freed memory", c.ReclaimFreed)
	return k, nil
}

// bare is the machine of the template: a pod's, without what is only the pod's.
func bare(c hypervisor.Config) hypervisor.Config {
	c.Vsock = hypervisor.VsockSerial
	c.ReadyParam = ""
	c.KernelParams = append(append([]string{}, c.KernelParams...), protocols.ParamChannel+"="+channel.PortName)
	c.HotplugPorts += len(c.Disks) // each lies in one
	c.Shares, c.NICs, c.Disks, c.Started, c.ShareLater = nil, nil, nil, nil, false
	c.Network = hypervisor.NetNS{}
	return c
}

// Start implements hypervisor.Hypervisor. An error that is ErrRestore leaves the
// caller to start again, with other shares and network devices.
func (h *Hypervisor) Start(ctx context.Context, c hypervisor.Config) (hypervisor.VM, error) {
	t := h.find(c)
	if t == nil {
		return h.Base.Start(ctx, c)
	}
	vm, err := h.clone(ctx, t, c)
	if err == nil || ctx.Err() != nil {
		return vm, err
	}
	h.mu.Lock()
	h.failed = true
	h.mu.Unlock()
	return nil, fmt.Errorf("%w %s: %w", ErrRestore, t.Digest, err)
}

// find returns the template of a machine, nil when it is to be booted.
func (h *Hypervisor) find(c hypervisor.Config) *Template {
	h.mu.Lock()
	failed := h.failed
	h.mu.Unlock()
	if failed {
		return nil
	}
	k, err := h.key(c)
	if err != nil {
		return nil // the boot says the same
	}
	t, err := h.Store.Open(k.Digest())
	if err == nil {
		return t
	}
	if !errdefs.IsNotFound(err) {
		h.Log.Warn("template is of no use, booting instead; it will be made again", "error", err)
	}
	h.mu.Lock()
	h.wanted = true
	h.mu.Unlock()
	return nil
}

// clone starts a machine from a template. It owns c's files, also when it fails.
func (h *Hypervisor) clone(ctx context.Context, t *Template, c hypervisor.Config) (_ hypervisor.VM, err error) {
	begin := time.Now()
	cc := bare(c)
	cc.Shares, cc.NICs, cc.Disks, cc.HotplugPorts = c.Shares, c.NICs, c.Disks, c.HotplugPorts
	cc.Started, cc.Network, cc.ShareLater = c.Started, c.Network, c.ShareLater
	started := false
	defer func() {
		if !started {
			c.CloseDevices()
		}
	}()
	if cc.Restore, err = t.State(); err != nil {
		return nil, err
	}
	defer cc.Restore.Close()
	release := func() {}
	if len(c.Shares) > 0 || c.ShareLater { // their daemons must see the memory
		m, err := t.Copy()
		if err != nil {
			return nil, err
		}
		defer m.Close() // the VMM has it
		cc.Memory, cc.MemoryFilled = m.File, m.Wait
	} else {
		m, err := t.Shared(ctx)
		if err != nil {
			return nil, err
		}
		release = func() {
			if err := m.Close(); err != nil {
				h.Log.Warn("template memory", "error", err)
			}
		}
		cc.Memory, cc.MemoryPrivate = m.File, true
	}
	loaded, restoring := time.Since(begin), time.Now()
	started = true
	vm, err := h.Base.Start(ctx, cc)
	if err != nil {
		release()
		return nil, err
	}
	h.releases.Go(func() { <-vm.Done(); release() })
	h.Log.Info("cloned", "template", t.Digest, "shared", cc.MemoryPrivate, "t_load", loaded, "t_restore", time.Since(restoring))
	return vm, nil
}

// Wait returns when nothing is held for machines that have ended; those that
// have not are waited for.
func (h *Hypervisor) Wait() { h.releases.Wait() }

// Wanted tells, once, whether a Start did not find a template: then it may be made
// when the pod runs.
func (h *Hypervisor) Wanted() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	w := h.wanted
	h.wanted = false
	return w
}

// Make makes the template of a machine, unless it is there, and returns its digest.
func (h *Hypervisor) Make(ctx context.Context, c hypervisor.Config) (string, error) {
	k, err := h.key(c)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, makeTimeout)
	defer cancel()
	begin := time.Now()
	err = h.Store.Make(ctx, k, int64(c.MemoryBytes), func(ctx context.Context, dir string, memory, state *os.File) error {
		if err := h.Store.room(int64(c.MemoryBytes)); err != nil {
			return err
		}
		return h.save(ctx, bare(c), dir, memory, state)
	})
	if err == nil {
		h.Log.Info("template made", "template", k.Digest(), "t_make", time.Since(begin))
	}
	return k.Digest(), err
}

// save boots a machine, waits until its agent has settled, and saves it.
func (h *Hypervisor) save(ctx context.Context, c hypervisor.Config, dir string, memory, state *os.File) error {
	c.ID, c.Dir, c.Memory = "template", dir, memory
	vm, err := h.Base.Start(ctx, c)
	if err != nil {
		return err
	}
	err = saveVM(ctx, vm, state)
	if err != nil && vm.Info().ConsoleTail != nil {
		err = &hypervisor.StartError{Phase: "save", Err: err, Console: vm.Info().ConsoleTail()}
	}
	return errors.Join(err, vm.Stop(ctx))
}

func saveVM(ctx context.Context, vm hypervisor.VM, state *os.File) error {
	w, ok := vm.(hypervisor.ReadyWaiter)
	s, ok2 := vm.(hypervisor.Snapshotter)
	if !ok || !ok2 {
		return fmt.Errorf("%T cannot be saved: %w", vm, errdefs.ErrNotImplemented)
	}
	if err := w.WaitReady(ctx); err != nil {
		return fmt.Errorf("the guest does not settle: %w", err)
	}
	return s.Save(ctx, state)
}
