// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/protocols"
)

// enterShare looks into the directories of the share that a container is to use.
// Each is a mount of its own on the host, and the kernel gives it a file system
// instance of its own when somebody first enters it, once in each mount namespace
// that has none yet (fs/fuse/dir.c, fuse_dentry_automount). Containers' namespaces
// begin as copies of this one, so what was entered here is there in all of them.
// That matters twice: a socket in a directory that containers use together is the
// same socket for all, and no container's end is the end of an instance, see leaveShare.
func (c *Container) enterShare(share string, spec *specs.Spec) error {
	own, pods := share+"/", share+"/"+protocols.PodSharePrefix
	enter := func(what, dir string) error {
		if !strings.HasPrefix(dir, own) {
			return nil
		}
		err := unix.Stat(dir+"/.", new(unix.Stat_t))
		switch {
		case errors.Is(err, unix.ENOTDIR): // a file has no instance
			return nil
		case err != nil:
			return fmt.Errorf("%s: %w", what, &os.PathError{Op: "stat", Path: dir, Err: err})
		case !strings.HasPrefix(dir, pods):
			c.entered = append(c.entered, dir)
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

// leaveShare ends the file system instances that only this container has used; its
// processes are gone. An instance that ends while one of its files is being
// released is a BUG of the kernel ("Busy inodes after unmount", fs/super.c), and a
// file that is closed while it is read ahead is released by a later message. The
// daemon takes messages one after the other: when it has answered a question, the
// reads before it have been answered and the release been sent, and after a second
// one that has been answered too.
func (c *Container) leaveShare() error {
	var errs []error
	for _, dir := range c.entered {
		for range 2 {
			_ = unix.Statx(unix.AT_FDCWD, dir, unix.AT_STATX_FORCE_SYNC, unix.STATX_BASIC_STATS, new(unix.Statx_t)) // the answer does not matter
		}
		// EINVAL: the host has no mount there, and so there is no instance.
		if err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, &os.PathError{Op: "umount", Path: dir, Err: err})
		}
	}
	c.entered = nil
	return errors.Join(errs...)
}
