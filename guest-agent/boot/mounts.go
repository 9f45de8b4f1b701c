// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// CgroupRoot is where the cgroup v2 hierarchy is mounted.
const CgroupRoot = "/sys/fs/cgroup"

type mount struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

// earlyMounts is what every guest needs, in order: a target may lie in an earlier one.
var earlyMounts = []mount{
	{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"dev", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
	{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"},
	{"shm", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	{"run", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
	{"tmp", "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	{"cgroup2", CgroupRoot, "cgroup2", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "nsdelegate"},
}

// Mount makes the early mounts. A file system that is already mounted stays.
func Mount() error {
	if err := leaveRootfs(); err != nil {
		return fmt.Errorf("move off the initial root: %w", err)
	}
	for _, m := range earlyMounts {
		err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data)
		if errors.Is(err, unix.ENOENT) {
			// The image did not make the directory; only a writable root lets us.
			if err = os.MkdirAll(m.target, 0o755); err == nil {
				err = unix.Mount(m.source, m.target, m.fstype, m.flags, m.data)
			}
		}
		if err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s on %s: %w", m.fstype, m.target, err)
		}
	}
	devLinks()
	if _, err := os.Lstat("/var/run"); errors.Is(err, os.ErrNotExist) {
		// Best effort: a read-only image without it simply has no /var/run.
		_ = os.MkdirAll("/var", 0o755)
		_ = os.Symlink("/run", "/var/run")
	}
	return nil
}

// devLinks makes the links that devtmpfs does not have; they exist after a restart of the agent.
func devLinks() {
	for name, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		_ = os.Symlink(target, filepath.Join("/dev", name))
	}
}

// leaveRootfs makes the root directory a mount that has a parent. The root an
// initrd is unpacked into has none, and pivot_root(2) refuses to leave such a
// root (EINVAL), so an OCI engine could not enter a container. A bind mount of
// the root onto itself, moved on top, costs nothing and copies nothing.
func leaveRootfs() error {
	var st unix.Statfs_t
	if err := unix.Statfs("/", &st); err != nil {
		return err
	}
	if st.Type != unix.RAMFS_MAGIC && st.Type != unix.TMPFS_MAGIC {
		return nil // a disk image: the kernel mounted it properly
	}
	const dir = "/.root"
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := unix.Mount("/", dir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind / on %s: %w", dir, err)
	}
	if err := unix.Chdir(dir); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move %s to /: %w", dir, err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return unix.Chdir("/")
}

// LoopbackUp brings lo up; the kernel gives it its addresses.
func LoopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("loopback: SIOCSIFFLAGS: %w", err)
	}
	return nil
}

// HasShare says whether the machine has a virtio-fs device (virtio 1.3 §5.11: id 26).
func HasShare(sys string) bool { return len(virtio(sys, "0x001a")) > 0 }
