// SPDX-License-Identifier: Apache-2.0

package network

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/sandbox/ledger"
)

// connectMacvtap puts a macvtap on the device. In passthru mode it takes over the
// device's hardware address and everything that is sent to it, and the device
// itself stays as it is.
func (e *endpoint) connectMacvtap() error {
	n := e.net
	name := fmt.Sprintf("%s%d", tapPrefix, e.Link.Index)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.ParentIndex, attrs.MTU = name, e.Link.Index, e.Link.MTU
	attrs.NumTxQueues, attrs.NumRxQueues = n.o.Queues, n.o.Queues
	l := &netlink.Macvtap{Macvlan: netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_PASSTHRU}}
	make := func() error {
		if err := n.ns.nl.LinkAdd(l); err != nil {
			return fmt.Errorf("macvtap %s on %s: %w", name, e.Link.Name, err)
		}
		return nil
	}
	if err := n.acquire(&e.undo, ledger.Link(n.ledgerNS, name), make, func() error { return gone(n.ns.nl.LinkDel(l)) }); err != nil {
		return err
	}
	made, err := n.ns.nl.LinkByName(name)
	if err != nil {
		return fmt.Errorf("macvtap %s: %w", name, err)
	}
	e.tap = made.Attrs().Index
	if err := n.ns.nl.LinkSetUp(made); err != nil {
		return fmt.Errorf("bring up macvtap %s: %w", name, err)
	}
	if e.taps, err = n.ns.openMacvtap(name, e.tap, n.o.Queues); err != nil {
		return fmt.Errorf("macvtap %s: %w", name, err)
	}
	return nil
}

// openMacvtap opens queues of a macvtap. Its character device is called after its
// index, which devices of other namespaces have too, so its number is read from
// the sysfs of the namespace, and a node made, in a mount namespace that ends
// with the thread.
func (n *namespace) openMacvtap(name string, index, queues int) (files []*os.File, err error) {
	err = n.do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("new mount namespace: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("private mounts: %w", err)
		}
		if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
			return fmt.Errorf("mount sysfs: %w", err)
		}
		dev, err := deviceNumber(filepath.Join("/sys/class/net", name, "tap"+strconv.Itoa(index), "dev"))
		if err != nil {
			return err
		}
		if err := unix.Mount("tmpfs", "/sys", "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "size=64k"); err != nil {
			return fmt.Errorf("mount tmpfs: %w", err)
		}
		if err := unix.Mknod("/sys/tap", unix.S_IFCHR|0o600, dev); err != nil {
			return fmt.Errorf("device node: %w", err)
		}
		for range queues {
			f, err := openMacvtapQueue(queues > 1)
			if err != nil {
				return err
			}
			files = append(files, f)
		}
		return nil
	})
	if err != nil {
		closeFiles(files)
		return nil, err
	}
	return files, nil
}

func openMacvtapQueue(multi bool) (*os.File, error) {
	fd, err := unix.Open("/sys/tap", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if multi {
		flags |= unix.IFF_MULTI_QUEUE
	}
	req, err := unix.NewIfreq("macvtap") // the device is that of the node; the name does not count
	if err == nil {
		req.SetUint16(flags)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("TUNSETIFF: %w", err)
	}
	return os.NewFile(uintptr(fd), "macvtap"), nil
}

// deviceNumber reads "major:minor".
func deviceNumber(path string) (int, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	major, minor, _ := strings.Cut(strings.TrimSpace(string(b)), ":")
	ma, err1 := strconv.ParseUint(major, 10, 32)
	mi, err2 := strconv.ParseUint(minor, 10, 32)
	if err1 != nil || err2 != nil {
		return 0, fmt.Errorf("%s holds %q: %w", path, b, errdefs.ErrInternal)
	}
	return int(unix.Mkdev(uint32(ma), uint32(mi))), nil
}
