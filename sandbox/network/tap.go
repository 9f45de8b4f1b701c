// SPDX-License-Identifier: Apache-2.0

package network

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// tunExcl makes TUNSETIFF refuse a device that exists (Linux if_tun.h, IFF_TUN_EXCL).
const tunExcl = 0x8000

// openTap opens queues of the tap called name, which is made unless it exists;
// excl refuses one that does. It ends with its last queue unless it existed.
func (n *namespace) openTap(name string, queues int, multi, excl bool) ([]*os.File, error) {
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if multi {
		flags |= unix.IFF_MULTI_QUEUE
	}
	var files []*os.File
	err := n.do(func() error {
		for i := range queues {
			fl := flags
			if excl && i == 0 {
				fl |= tunExcl
			}
			f, err := openQueue(name, fl)
			if err != nil {
				return err
			}
			files = append(files, f)
		}
		return nil
	})
	if err == nil {
		return files, nil
	}
	closeFiles(files)
	if errors.Is(err, unix.EBUSY) {
		err = fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
		if excl {
			err = fmt.Errorf("tap %s exists: does another machine use this network namespace? %w", name, err)
		}
	}
	return nil, fmt.Errorf("open tap %s: %w", name, err)
}

// openQueue needs a thread in the tap's namespace.
func openQueue(name string, flags uint16) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/dev/net/tun", Err: err}
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(flags)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("TUNSETIFF: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// openVhost opens the kernel's virtio-net back-end once for each queue; none when
// the host does not have it.
func openVhost(queues int) ([]*os.File, error) {
	var files []*os.File
	for range queues {
		f, err := os.OpenFile("/dev/vhost-net", os.O_RDWR, 0)
		switch {
		case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
			closeFiles(files)
			return nil, nil
		case err != nil:
			closeFiles(files)
			return nil, fmt.Errorf("vhost-net (hypervisor.qemu.disable_vhost_net turns it off): %w", err)
		}
		files = append(files, f)
	}
	return files, nil
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
