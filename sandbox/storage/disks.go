// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/hypervisor"
)

// Disks counts the users of a pod's disks: the first one attaches a disk, the
// last one detaches it, and who comes meanwhile waits. Users are containers. The
// disks hold nothing on the host but files that the machine has open, so there is
// nothing to release when it ends.
//
//	(none) ──Attach──▶ attaching ──▶ attached ──last Release──▶ detaching ──▶ (none)
//	                       └─ error ─▶ (none)
type Disks struct {
	mu   sync.Mutex
	next int                // guarded by mu; number of the next disk's ID
	all  map[string]*disk   // guarded by mu; by Source.Key
	held map[string][]*disk // guarded by mu; by user
	boot []*disk            // guarded by mu; those of Boot or Restore
	keep bool               // guarded by mu; Keep was called
}

// disk is one that is attached, or being attached or detached.
type disk struct {
	key, id  string
	readOnly bool
	users    int           // guarded by Disks.mu
	ready    chan struct{} // closed when attached, or when that failed
	place    string        // read after ready
	err      error         // read after ready
	gone     chan struct{} // not nil while it is detached, closed at the end; guarded by Disks.mu
	kept     keptFiles     // guarded by Disks.mu
}

// NewDisks returns the disks of a pod that has none.
func NewDisks() *Disks {
	return &Disks{all: map[string]*disk{}, held: map[string][]*disk{}}
}

// Boot plans sources into a machine that is about to start; user holds them.
// Booted says at which places they are, or that there is no machine.
func (d *Disks) Boot(user string, sources []*Source) []hypervisor.Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []hypervisor.Disk
	for _, s := range sources {
		if d.all[s.Key] != nil { // twice in one container
			s.Close()
			continue
		}
		n := d.newDisk(s)
		n.users = 1
		d.held[user], d.boot = append(d.held[user], n), append(d.boot, n)
		out = append(out, hypervisor.Disk{ID: n.id, Parts: s.Parts, ReadOnly: s.ReadOnly})
	}
	return out
}

// newDisk adds a disk; d.mu is held.
func (d *Disks) newDisk(s *Source) *disk {
	n := &disk{key: s.Key, id: diskName + strconv.Itoa(d.next), readOnly: s.ReadOnly, ready: make(chan struct{})}
	d.next++
	d.add(n, s)
	return n
}

// add makes a disk one of the pod's; d.mu is held.
func (d *Disks) add(n *disk, s *Source) {
	d.all[n.key] = n
	if d.keep {
		n.kept.open(s)
	}
}

// Booted completes Boot or Restore.
func (d *Disks) Booted(places []string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, n := range d.boot {
		if n.err = err; err == nil {
			n.place = places[i]
		}
		close(n.ready)
	}
}

// Attach makes a source a disk of the running machine, or finds the one that it
// is already, and returns its place in the guest. The source's files are closed in
// any case. The user holds the disk until Release.
func (d *Disks) Attach(ctx context.Context, vm hypervisor.VM, user string, s *Source) (string, error) {
	n, first, err := d.hold(ctx, user, s)
	if err != nil || !first {
		s.Close()
	}
	if err != nil {
		return "", err
	}
	if first {
		n.place, n.err = plug(ctx, vm, n.id, s)
		close(n.ready)
	}
	select {
	case <-n.ready:
	case <-ctx.Done():
		return "", ctx.Err() // the user holds it still, and releases it
	}
	if n.err != nil {
		return "", n.err
	}
	return n.place, nil
}

// hold finds or adds the disk of a source; first is to attach it.
func (d *Disks) hold(ctx context.Context, user string, s *Source) (n *disk, first bool, err error) {
	for {
		d.mu.Lock()
		n = d.all[s.Key]
		if n == nil || n.gone == nil {
			break
		}
		gone := n.gone
		d.mu.Unlock()
		select {
		case <-gone:
		case <-ctx.Done():
			return nil, false, ctx.Err()
		}
	}
	defer d.mu.Unlock()
	switch {
	case n == nil:
		n, first = d.newDisk(s), true
	case n.readOnly != s.ReadOnly:
		return nil, false, fmt.Errorf("the disk is attached read-only %t to another container of the pod, read-only %t is wanted: %w", n.readOnly, s.ReadOnly, errdefs.ErrFailedPrecondition)
	}
	n.users++
	d.held[user] = append(d.held[user], n)
	return n, first, nil
}

func plug(ctx context.Context, vm hypervisor.VM, id string, s *Source) (string, error) {
	p, ok := vm.(hypervisor.DiskPlugger)
	if !ok {
		s.Close()
		return "", fmt.Errorf("this hypervisor takes no disks while the machine runs: %w", errdefs.ErrNotImplemented)
	}
	place, err := p.PlugDisk(ctx, hypervisor.Disk{ID: id, Parts: s.Parts, ReadOnly: s.ReadOnly})
	if err != nil {
		return "", fmt.Errorf("attach disk: %w", err)
	}
	return place, nil
}

// AttachPath is Attach for the file or block device at a path.
func (d *Disks) AttachPath(ctx context.Context, vm hypervisor.VM, user, path string, readOnly bool) (string, error) {
	s, err := d.OpenSource(path, readOnly)
	if err != nil {
		return "", err
	}
	return d.Attach(ctx, vm, user, s)
}

// ID is that of the disk with a key, and whether there is one.
func (d *Disks) ID(key string) (string, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if n := d.all[key]; n != nil && n.gone == nil {
		return n.id, true
	}
	return "", false
}

// Resize tells the guest of the new size, in bytes, of the disk that is the file
// or device at path; a file is made that long.
func (d *Disks) Resize(ctx context.Context, vm hypervisor.VM, path string, bytes uint64) error {
	key, err := pathKey(path)
	if err != nil {
		return err
	}
	id, there := d.ID(key)
	if !there {
		return fmt.Errorf("disk %s is not one of this pod's: %w", path, errdefs.ErrNotFound)
	}
	r, ok := vm.(hypervisor.DiskResizer)
	if !ok {
		return fmt.Errorf("this hypervisor's disks keep their size: %w", errdefs.ErrNotImplemented)
	}
	return r.ResizeDisk(ctx, id, bytes)
}

// Holds tells whether a user has disks.
func (d *Disks) Holds(user string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.held[user]) > 0
}

// Release takes a user away and detaches what nobody else uses. The guest must
// have let go of it. It is idempotent, unless it fails: then the rest is held on.
func (d *Disks) Release(ctx context.Context, vm hypervisor.VM, user string) error {
	d.mu.Lock()
	held := d.held[user]
	delete(d.held, user)
	var last []*disk
	for _, n := range held {
		if n.users--; n.users == 0 {
			n.gone = make(chan struct{})
			last = append(last, n)
		}
	}
	d.mu.Unlock()
	var errs []error
	for _, n := range last {
		errs = append(errs, d.detach(ctx, vm, user, n))
	}
	return errors.Join(errs...)
}

// detach takes out a disk that has no user.
func (d *Disks) detach(ctx context.Context, vm hypervisor.VM, user string, n *disk) (err error) {
	<-n.ready // its attaching does not outlive the container's creation
	if p, ok := vm.(hypervisor.DiskPlugger); ok && n.err == nil {
		err = p.UnplugDisk(ctx, n.id)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	close(n.gone)
	n.gone = nil
	if err == nil {
		delete(d.all, n.key)
		n.kept.close()
		return nil
	}
	n.users++
	d.held[user] = append(d.held[user], n)
	return fmt.Errorf("detach disk: %w", err)
}

// has tells whether a source is a disk of the pod.
func (d *Disks) has(key string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.all[key] != nil
}

// Attached counts the disks that are attached or being attached.
func (d *Disks) Attached() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.all)
}
