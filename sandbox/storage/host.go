// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/internal/spawn"
)

// hostMounts finds sources of mounts where containerd names them: in its mount
// namespace as it is now. The shim's own is a copy of that from the pod's
// start. It hears of later mounts only where the host's are shared, and a
// container that is created later may be given what was mounted since.
type hostMounts struct {
	ns *os.File // nil for this process's own namespace

	mu     sync.Mutex
	thread *spawn.Thread // guarded by mu; made on first use
	closed bool          // guarded by mu
}

// do runs f where paths are the host's.
func (h *hostMounts) do(f func() error) error {
	if h.ns == nil {
		return f()
	}
	t, err := h.enter()
	if err != nil {
		return err
	}
	return t.Do(f)
}

// Flags are those of the host's file system at path, as statfs(2) has them; none
// when it cannot be asked.
func (s *Share) Flags(path string) (flags int64) {
	_ = s.host.do(func() error {
		var st unix.Statfs_t
		err := unix.Statfs(path, &st)
		flags = st.Flags
		return err
	})
	return flags
}

// tree copies the mount at source, with those below it if recursive, into a
// detached tree that the caller owns by its descriptor (open_tree(2), Linux 5.2).
func (h *hostMounts) tree(source string, recursive bool) (fd int, err error) {
	how := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if recursive {
		how |= unix.AT_RECURSIVE
	}
	err = h.do(func() (err error) {
		fd, err = unix.OpenTree(unix.AT_FDCWD, source, how)
		return err
	})
	return fd, err
}

// enter is the thread that is in the host's mount namespace.
func (h *hostMounts) enter() (*spawn.Thread, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.closed:
		return nil, spawn.ErrClosed
	case h.thread != nil:
		return h.thread, nil
	}
	t, err := h.newThread()
	if err != nil {
		return nil, err
	}
	h.thread = t
	return t, nil
}

// newThread is another thread in the host's mount namespace, with a working
// directory of its own.
func (h *hostMounts) newThread() (*spawn.Thread, error) {
	t := spawn.NewThread()
	err := t.Do(func() error {
		// setns(2): a thread that shares its root directory with others may not move.
		if err := unix.Unshare(unix.CLONE_FS); err != nil || h.ns == nil {
			return err
		}
		return unix.Setns(int(h.ns.Fd()), unix.CLONE_NEWNS)
	})
	if err != nil {
		t.Close()
		return nil, fmt.Errorf("enter the host's mount namespace: %w", err)
	}
	return t, nil
}

// scratchPoint is a directory of every host that nothing to be mounted lies below.
const scratchPoint = "/proc"

// filesystem has mount, a function that mounts at the directory that it is told,
// make a mount where the host's mounts of now are seen, and returns it detached.
// It is made in a copy of the host's namespace that goes at once, so that it
// appears nowhere.
func (h *hostMounts) filesystem(mount func(at string) error) (fd int, err error) {
	t, err := h.newThread()
	if err != nil {
		return -1, err
	}
	defer t.Close()
	err = t.Do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("copy the host's mount namespace: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("private mounts: %w", err)
		}
		if err := mount(scratchPoint); err != nil {
			return err
		}
		fd, err = unix.OpenTree(unix.AT_FDCWD, scratchPoint, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		return err
	})
	return fd, err
}

func (h *hostMounts) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.thread != nil && !h.closed {
		h.thread.Close()
	}
	h.closed = true
}

// mountAttributes are the flags of mount(2) that one mount has by itself, as
// mount_setattr(2) knows them.
var mountAttributes = map[uintptr]unix.MountAttr{
	unix.MS_RDONLY: {Attr_set: unix.MOUNT_ATTR_RDONLY}, unix.MS_NOSUID: {Attr_set: unix.MOUNT_ATTR_NOSUID},
	unix.MS_NODEV: {Attr_set: unix.MOUNT_ATTR_NODEV}, unix.MS_NOEXEC: {Attr_set: unix.MOUNT_ATTR_NOEXEC},
	unix.MS_NODIRATIME:  {Attr_set: unix.MOUNT_ATTR_NODIRATIME},
	unix.MS_NOATIME:     {Attr_set: unix.MOUNT_ATTR_NOATIME, Attr_clr: unix.MOUNT_ATTR__ATIME},
	unix.MS_RELATIME:    {Attr_set: unix.MOUNT_ATTR_RELATIME, Attr_clr: unix.MOUNT_ATTR__ATIME},
	unix.MS_STRICTATIME: {Attr_set: unix.MOUNT_ATTR_STRICTATIME, Attr_clr: unix.MOUNT_ATTR__ATIME},
}

// bind makes a bind mount; a recursive read-only one is read-only all the way
// down. The mount gets its flags before it gets its place: what appears in the
// share is copied into the daemon's mount namespace at that moment, and no later
// change of flags would follow it there.
//
// Without MS_PRIVATE it is a slave of its source: what the host mounts below that
// later appears, and never the other way round.
func (h *hostMounts) bind(source, target string, flags uintptr) error {
	fd, err := h.tree(source, flags&unix.MS_REC != 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return place(fd, target, flags)
}

// place gives a detached tree its flags and its place. Nobody on the host opens
// devices there, least of all the daemon, which may make nodes: the guest's kernel
// opens its own.
func place(fd int, target string, flags uintptr) error {
	var below uint
	if flags&unix.MS_REC != 0 {
		below = unix.AT_RECURSIVE
	}
	flags |= unix.MS_NODEV
	propagation := unix.MountAttr{Propagation: unix.MS_SLAVE}
	if flags&unix.MS_PRIVATE != 0 {
		propagation.Propagation = unix.MS_PRIVATE
	}
	err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|below, &propagation)
	for flag, attr := range mountAttributes {
		if flags&flag == 0 {
			continue
		}
		at := uint(unix.AT_EMPTY_PATH)
		if flag == unix.MS_RDONLY || flag == unix.MS_NODEV {
			at |= below
		}
		err = errors.Join(err, unix.MountSetattr(fd, "", at, &attr))
	}
	if err != nil {
		return fmt.Errorf("mount flags (they need Linux 5.12): %w", err)
	}
	return unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
}
