// SPDX-License-Identifier: Apache-2.0

// Package storage mounts what the host attaches to the guest or asks the guest
// to provide, and unmounts it when its last user is gone.
package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/boot"
	"github.com/kata-v2/kata/guest-agent/devices"
	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// handler makes one kind of storage available at its mount point.
type handler func(m *Manager, ctx context.Context, s *agentpb.Storage, cid string) error

// handlers are the values of Storage.driver that this agent knows
// (agent-protocol facts of Kata Containers 4.1, part D).
var handlers = map[string]handler{
	"virtio-fs": (*Manager).virtioFS,
	"overlayfs": (*Manager).overlay,
	"ephemeral": (*Manager).ephemeral,
	"local":     (*Manager).local,
	"bind":      (*Manager).bind,
	"blk":       (*Manager).block,
	"mmioblk":   (*Manager).block,
	"scsi":      (*Manager).scsi,
	"nvdimm":    (*Manager).block,
}

// Drivers lists the handled drivers.
func Drivers() []string {
	var out []string
	for k := range handlers {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// Modules loads kernel modules on demand; *boot.Modules is one.
type Modules interface {
	Ensure(group string) error
	EnsureFS(fstype string) error
	EnsureModule(name string) error
}

// Manager counts the users of each mount point.
type Manager struct {
	modules Modules
	finder  *devices.Finder
	runDir  string // where overlays keep their upper directories

	layersDir string        // where layers are mounted
	groups    atomic.Uint64 // numbers the directories below it

	mu      sync.Mutex
	entries map[string]*entry // guarded by mu; by mount point
}

type entry struct {
	users  int
	shared bool          // freed with the sandbox only
	ready  chan struct{} // closed when the mount is made or has failed
	err    error         // read after ready
	umount bool

	// Written while the mount is made, read after ready.
	undo     []func() error // what else goes when the mount point is unmounted, last first
	verities []*verityDevice
}

// corruption names the layers of which a read has failed dm-verity's check.
func (e *entry) corruption() error {
	var errs []error
	for _, d := range e.verities {
		if d.corrupted() {
			errs = append(errs, fmt.Errorf("%s is corrupted: what was read of it does not match its dm-verity root hash", d.what))
		}
	}
	return errors.Join(errs...)
}

func (e *entry) runUndo() error {
	var errs []error
	for i := len(e.undo) - 1; i >= 0; i-- {
		errs = append(errs, e.undo[i]())
	}
	e.undo = nil
	return errors.Join(errs...)
}

// NewManager makes one. runDir is the base of the containers' directories.
func NewManager(m Modules, f *devices.Finder, runDir string) *Manager {
	return &Manager{modules: m, finder: f, runDir: runDir, layersDir: layersDir, entries: map[string]*entry{}}
}

// Add makes s available for container cid (the sandbox when empty) and returns
// the mount point to give back to Remove. One that is there already gains a user.
func (m *Manager) Add(ctx context.Context, s *agentpb.Storage, cid string) (string, error) {
	h, ok := handlers[s.GetDriver()]
	if !ok {
		return "", fault.New(fault.InvalidArgument, "storage driver %q: want one of %v", s.GetDriver(), Drivers())
	}
	for _, o := range s.DriverOptions {
		if o != "" && !knownDriverOption(o) {
			return "", fault.New(fault.Unimplemented, "storage %s: driver option %q is not supported by this guest", s.Source, o)
		}
	}
	mp, err := cleanMountPoint(s)
	if err != nil {
		return "", err
	}
	return m.add(ctx, entry{shared: s.Shared, umount: s.Driver != "local"}, mp, fmt.Sprintf("driver %s, source %q", s.Driver, s.Source),
		func(*entry) error { return m.make(ctx, h, s, mp, cid) })
}

func cleanMountPoint(s *agentpb.Storage) (string, error) {
	mp := filepath.Clean(s.MountPoint)
	if !filepath.IsAbs(mp) || mp == "/" {
		return "", fault.New(fault.InvalidArgument, "storage mount_point %q: want an absolute path below /", s.MountPoint)
	}
	return mp, nil
}

// add gains a user of a mount point, which build makes for the first one. kind
// says what such a mount is like, what describes it in errors.
func (m *Manager) add(ctx context.Context, kind entry, mp, what string, build func(*entry) error) (string, error) {
	m.mu.Lock()
	e, exists := m.entries[mp]
	if !exists {
		e = &entry{ready: make(chan struct{}), umount: kind.umount}
		m.entries[mp] = e
	}
	e.users++
	e.shared = e.shared || kind.shared
	m.mu.Unlock()
	if !exists {
		e.err = build(e)
		close(e.ready)
	}
	select {
	case <-e.ready:
	case <-ctx.Done():
		return "", errors.Join(context.Cause(ctx), m.Remove(mp))
	}
	if e.err != nil {
		m.forget(mp, e)
		return "", fmt.Errorf("storage %s (%s): %w", mp, what, e.err)
	}
	return mp, nil
}

func (m *Manager) make(ctx context.Context, h handler, s *agentpb.Storage, mp, cid string) error {
	if err := h(m, ctx, s, cid); err != nil {
		return err
	}
	if err := applyFSGroup(mp, s.FsGroup); err != nil {
		return errors.Join(fmt.Errorf("fs_group: %w", err), unmount(mp))
	}
	return nil
}

// Corruption names the layers of mount points of which a read has failed
// dm-verity's check: the reader has got an I/O error.
func (m *Manager) Corruption(mps []string) error {
	var errs []error
	for _, mp := range mps {
		m.mu.Lock()
		e := m.entries[mp]
		m.mu.Unlock()
		if e != nil {
			<-e.ready
			errs = append(errs, e.corruption())
		}
	}
	return errors.Join(errs...)
}

func (m *Manager) forget(mp string, e *entry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.entries[mp] == e {
		delete(m.entries, mp)
	}
}

// Remove takes one user away and unmounts after the last one. It is idempotent.
func (m *Manager) Remove(mp string) error {
	m.mu.Lock()
	e, ok := m.entries[mp]
	if ok {
		e.users--
		if e.users > 0 || e.shared {
			ok = false
		} else {
			delete(m.entries, mp)
		}
	}
	m.mu.Unlock()
	if !ok || !e.umount {
		return nil
	}
	return errors.Join(unmount(mp), e.runUndo())
}

func unmount(mp string) error {
	err := unix.Unmount(mp, unix.UMOUNT_NOFOLLOW)
	if err == unix.EBUSY {
		// Somebody still looks in (a debug shell): let go of it now, the kernel
		// finishes when they leave.
		err = unix.Unmount(mp, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	if err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("unmount %s: %w", mp, err)
	}
	return nil
}

// mountAt makes the mount point and mounts there.
func (m *Manager) mountAt(source, mp, fstype string, words []string) error {
	if err := m.modules.EnsureFS(fstype); err != nil {
		return err
	}
	if err := os.MkdirAll(mp, 0o755); err != nil {
		return err
	}
	o := ParseOptions(words)
	if err := unix.Mount(source, mp, fstype, o.Flags, o.Data); err != nil {
		if errors.Is(err, unix.ENODEV) {
			err = fmt.Errorf("the guest's kernel has no file system %s: %w", fstype, err)
		}
		return fmt.Errorf("mount %s as %s with options %q: %w", source, fstype, words, err)
	}
	if o.Propagation != 0 {
		if err := unix.Mount("", mp, "", o.Propagation, ""); err != nil {
			return errors.Join(fmt.Errorf("propagation of %s: %w", mp, err), unmount(mp))
		}
	}
	return nil
}

// bindMount binds source on target; read-only needs a second call, since the
// kernel ignores the flag in the first.
func bindMount(source, target string, o Options) error {
	if err := unix.Mount(source, target, "", unix.MS_BIND|o.Flags&unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind %s on %s: %w", source, target, err)
	}
	if rest := o.Flags &^ (unix.MS_BIND | unix.MS_REC); rest != 0 {
		if err := unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|rest, ""); err != nil {
			return errors.Join(fmt.Errorf("flags of bind mount %s: %w", target, err), unmount(target))
		}
	}
	return nil
}

// virtioFS mounts a share. The device of a machine that was restored is plugged in
// while the pod begins; until then the kernel calls its tag invalid.
func (m *Manager) virtioFS(ctx context.Context, s *agentpb.Storage, _ string) error {
	var last error
	err := m.finder.WaitFor(ctx, "virtio-fs device "+s.Source, func() (bool, error) {
		if last = m.mountAt(s.Source, s.MountPoint, "virtiofs", s.Options); errors.Is(last, unix.EINVAL) {
			return false, nil
		}
		return true, last
	})
	if err != nil && errors.Is(last, unix.EINVAL) {
		return errors.Join(last, err)
	}
	return err
}

func (m *Manager) bind(_ context.Context, s *agentpb.Storage, _ string) error {
	st, err := os.Stat(s.Source)
	if err != nil {
		return err
	}
	if err := mountPoint(s.MountPoint, st.IsDir()); err != nil {
		return err
	}
	return bindMount(s.Source, s.MountPoint, ParseOptions(s.Options))
}

// mountPoint makes a directory, or an empty file for something that is none.
func mountPoint(path string, dir bool) error {
	if dir {
		return os.MkdirAll(path, 0o755)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}

func (m *Manager) block(ctx context.Context, s *agentpb.Storage, _ string) error {
	if err := m.modules.Ensure(boot.GroupBlock); err != nil {
		return err
	}
	find := m.finder.BlockByPCI
	if filepath.IsAbs(s.Source) {
		find = m.finder.BlockByName
	}
	node, err := find(ctx, s.Source)
	if err != nil {
		return err
	}
	return m.mountAt(node, s.MountPoint, s.Fstype, s.Options)
}

func (m *Manager) scsi(ctx context.Context, s *agentpb.Storage, _ string) error {
	if err := m.modules.Ensure(boot.GroupBlock); err != nil {
		return err
	}
	node, err := m.finder.BlockBySCSI(ctx, s.Source)
	if err != nil {
		return err
	}
	return m.mountAt(node, s.MountPoint, s.Fstype, s.Options)
}

// Remount changes the options of an ephemeral mount, such as its size.
func (m *Manager) Remount(s *agentpb.Storage) error {
	if s.GetDriver() != "ephemeral" {
		return fault.New(fault.InvalidArgument, "storage driver %q cannot be changed: want ephemeral", s.GetDriver())
	}
	mp := filepath.Clean(s.MountPoint)
	m.mu.Lock()
	_, ok := m.entries[mp]
	m.mu.Unlock()
	if !ok {
		return fault.New(fault.NotFound, "storage %s is not mounted", mp)
	}
	words, _, err := takeGID(s.Options)
	if err != nil {
		return err
	}
	o := ParseOptions(words)
	if err := unix.Mount("", mp, orName(s.Fstype, "tmpfs"), o.Flags|unix.MS_REMOUNT, o.Data); err != nil {
		return fmt.Errorf("remount %s with options %q: %w", mp, words, err)
	}
	return nil
}
