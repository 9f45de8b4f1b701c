// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// shareUse is what a container has of the share.
type shareUse struct {
	mu      sync.Mutex
	dir     string   // guarded by mu; the share, empty when nothing of it is used
	entered []string // guarded by mu; what leaveShare leaves, each name with Pod.use
	mounts  *os.File // guarded by mu; the container's mount namespace
}

// enterShare looks into the directories of the share that a container is to use.
// Each is a mount of its own on the host, and the kernel gives it a file system
// instance of its own when somebody first enters it, once in each mount namespace
// that has none yet (fs/fuse/dir.c, fuse_dentry_automount). Containers' namespaces
// begin as copies of this one, so what was entered here is there in all of them.
// That matters twice: a socket in a directory that containers use together is the
// same socket for all, and no container's end is the end of an instance, see leaveShare.
func (c *Container) enterShare(share string, spec *specs.Spec) error {
	c.share.mu.Lock()
	defer c.share.mu.Unlock()
	enter := func(what, name string) error {
		if !strings.HasPrefix(name, share+"/") {
			return nil
		}
		c.share.dir = share
		c.pod.use(name)
		c.share.entered = append(c.share.entered, name)
		err := unix.Stat(name+"/.", new(unix.Stat_t))
		if err != nil && !errors.Is(err, unix.ENOTDIR) { // a file has no instance
			return fmt.Errorf("%s: %w", what, &os.PathError{Op: "stat", Path: name, Err: err})
		}
		return nil
	}
	if spec.Root != nil {
		if err := enter("root.path", spec.Root.Path); err != nil {
			return err
		}
	}
	for _, m := range spec.Mounts {
		if err := enter("mount "+m.Destination, m.Source); err != nil {
			return err
		}
	}
	return nil
}

// holdMounts keeps the mount namespace of the container's first process until
// leaveShare: with it the instances that were first entered there, mounts of the
// host below a shared directory, also those that the host makes later.
func (c *Container) holdMounts(pid int) error {
	c.share.mu.Lock()
	defer c.share.mu.Unlock()
	if c.share.dir == "" {
		return nil
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil // the process has ended already, and has entered nothing
	}
	c.share.mounts = f
	return err
}

// leaveShare ends the file system instances that only this container still uses; its
// processes are gone. An instance that ends while one of its files is being
// released is a BUG of the kernel ("Busy inodes after unmount", fs/super.c), and a
// file that is closed while it is read ahead is released by a later message. The
// daemon takes messages one after the other: when it has answered a question, the
// reads before it have been answered and the release been sent, and after a second
// one that has been answered too.
func (c *Container) leaveShare() error {
	c.share.mu.Lock()
	defer c.share.mu.Unlock()
	if c.share.dir == "" {
		return nil
	}
	for range 2 {
		_ = unix.Statx(unix.AT_FDCWD, c.share.dir, unix.AT_STATX_FORCE_SYNC, unix.STATX_BASIC_STATS, new(unix.Statx_t)) // the answer does not matter
	}
	var errs []error
	if c.share.mounts != nil {
		errs = append(errs, c.share.mounts.Close())
	}
	for _, name := range c.share.entered {
		errs = append(errs, c.pod.leave(c.share.dir, name))
	}
	c.share.dir, c.share.entered, c.share.mounts = "", nil, nil
	return errors.Join(errs...)
}

// sharedName is a name in the share that containers use.
type sharedName struct {
	users int
	left  chan struct{} // once users is 0; closed when the name has been left
}

// use counts a user of a name in the share; it waits for one that is being left.
func (p *Pod) use(name string) {
	for {
		p.mu.Lock()
		n := p.shared[name]
		if n == nil || n.users > 0 {
			if n == nil {
				n = &sharedName{}
				if p.shared == nil {
					p.shared = map[string]*sharedName{}
				}
				p.shared[name] = n
			}
			n.users++
			p.mu.Unlock()
			return
		}
		p.mu.Unlock()
		<-n.left
	}
}

// leave counts a user less; with the last one the file system instance ends.
func (p *Pod) leave(share, name string) error {
	p.mu.Lock()
	n := p.shared[name]
	n.users--
	last := n.users == 0
	if last {
		n.left = make(chan struct{})
	}
	p.mu.Unlock()
	if !last {
		return nil
	}
	// EINVAL: the host has no mount there, and so there is no instance.
	err := unix.Unmount(name, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	p.left(share, []string{name})
	p.mu.Lock()
	delete(p.shared, name)
	p.mu.Unlock()
	close(n.left)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "umount", Path: name, Err: err}
	}
	return nil
}

// left notes names in the share that no container uses any more.
func (p *Pod) left(share string, names []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stale == nil {
		p.stale = map[string]string{}
	}
	for _, name := range names {
		p.stale[name] = share
	}
}

// LeaveShare has the containers that have ended leave the share, and the kernel
// forget what the host has taken out of it: the daemon has each file open that the
// kernel knows, and so holds the host's file system.
func (p *Pod) LeaveShare(ctx context.Context) error {
	var errs []error
	for _, c := range p.Containers() {
		if !c.init.exited() {
			continue
		}
		err := c.group.WaitEmpty(ctx)
		if err == nil {
			err = c.leaveShare()
		}
		if _, gone := p.Container(c.ID); err != nil && gone == nil {
			errs = append(errs, fmt.Errorf("container %s: %w", c.ID, err))
		}
	}
	p.mu.Lock()
	byShare := map[string][]string{}
	for name, share := range p.stale {
		byShare[share] = append(byShare[share], name)
	}
	p.mu.Unlock()
	for share, names := range byShare {
		forgotten, err := forget(share, names)
		errs = append(errs, err)
		p.mu.Lock()
		for _, name := range forgotten {
			delete(p.stale, name)
		}
		p.mu.Unlock()
	}
	return errors.Join(errs...)
}

// forget has the kernel ask the daemon for names in the share, however long it may
// trust what it knows of them (fuse_dentry_revalidate asks for LOOKUP_EXCL), and
// returns those that are no more there. mkdir(2) is the call that asks: of a view that
// takes no writes, so that it makes nothing.
func forget(share string, names []string) (gone []string, err error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, share, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, &os.PathError{Op: "open_tree", Path: share, Err: err}
	}
	defer unix.Close(fd)
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return nil, &os.PathError{Op: "mount_setattr", Path: share, Err: err}
	}
	for _, name := range names {
		rel, err := filepath.Rel(share, name)
		if err != nil {
			return gone, err
		}
		if errors.Is(unix.Mkdirat(fd, rel, 0), unix.EEXIST) {
			continue
		}
		gone = append(gone, name)
		if dir := filepath.Dir(rel); dir != "." { // a container's, which holds its root alone
			_ = unix.Mkdirat(fd, dir, 0)
		}
	}
	return gone, nil
}
