// SPDX-License-Identifier: Apache-2.0

// Package devices finds the guest's name of a device that the host names by its
// place on a bus, and waits for one that is still being plugged in.
package devices

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
)

// Finder looks devices up in sysfs.
type Finder struct {
	// Sys and Dev are "/sys" and "/dev", or copies of their shape in tests.
	Sys, Dev string
	// Timeout bounds the wait for a device (agent.hotplug_timeout).
	Timeout time.Duration
}

// PCIDir returns the sysfs directory of the device at a PCI path: slots in
// hexadecimal from the root bus down, "02/03" (each maybe with a function,
// "02.1"). A first segment of 0x20 and more names an expander root bus instead.
func (f *Finder) PCIDir(path string) (string, bool, error) {
	dir := filepath.Join(f.Sys, "devices", "pci0000:00")
	for i, seg := range strings.Split(path, "/") {
		slotText, fnText, _ := strings.Cut(seg, ".")
		slot, err := strconv.ParseUint(slotText, 16, 8)
		fn := uint64(0)
		if err == nil && fnText != "" {
			fn, err = strconv.ParseUint(fnText, 16, 3)
		}
		if err != nil {
			return "", false, fault.New(fault.InvalidArgument, "PCI path %q: segment %q: want a slot in hexadecimal, such as 02/03", path, seg)
		}
		if i == 0 && slot >= 0x20 {
			dir = filepath.Join(f.Sys, "devices", fmt.Sprintf("pci0000:%02x", slot))
			continue
		}
		m, _ := filepath.Glob(filepath.Join(dir, fmt.Sprintf("????:??:%02x.%x", slot, fn)))
		if len(m) == 0 {
			return "", false, nil
		}
		dir = m[0]
	}
	return dir, true, nil
}

// BlockByPCI returns the device node of the disk at a PCI path, waiting for it.
func (f *Finder) BlockByPCI(ctx context.Context, path string) (string, error) {
	return f.wait(ctx, "disk at PCI path "+path, func() (string, bool, error) {
		dir, ok, err := f.PCIDir(path)
		if !ok || err != nil {
			return "", false, err
		}
		return f.node(filepath.Join(dir, "virtio*", "block", "*"), filepath.Join(dir, "nvme", "nvme*", "nvme*n*"))
	})
}

// BlockBySCSI returns the device node of a disk "<scsi-id>:<lun>" on any SCSI host.
func (f *Finder) BlockBySCSI(ctx context.Context, addr string) (string, error) {
	id, lun, ok := strings.Cut(addr, ":")
	if !ok || strings.Contains(addr, "/") {
		return "", fault.New(fault.InvalidArgument, "SCSI address %q: want <id>:<lun>", addr)
	}
	hosts, _ := filepath.Glob(filepath.Join(f.Sys, "class", "scsi_host", "host*", "scan"))
	for _, h := range hosts {
		// The host adapter does not always announce a new disk by itself.
		if err := os.WriteFile(h, []byte("0 "+id+" "+lun), 0); err != nil {
			return "", fmt.Errorf("scan SCSI bus: %w", err)
		}
	}
	return f.wait(ctx, "disk at SCSI address "+addr, func() (string, bool, error) {
		return f.node(filepath.Join(f.Sys, "class", "scsi_device", "*:0:"+id+":"+lun, "device", "block", "*"))
	})
}

// BlockByName waits for a device node such as /dev/vda or /dev/pmem0.
func (f *Finder) BlockByName(ctx context.Context, name string) (string, error) {
	base, ok := strings.CutPrefix(name, "/dev/")
	if !ok || strings.Contains(base, "..") {
		return "", fault.New(fault.InvalidArgument, "device %q: want a path below /dev", name)
	}
	path := filepath.Join(f.Dev, base)
	return f.wait(ctx, "device "+name, func() (string, bool, error) {
		ok, err := live(path)
		return path, ok, err
	})
}

// BlockGrown waits until the disk with a device number has at least so many bytes:
// the kernel hears of a new size from the hypervisor by an interrupt and says so
// in a uevent (RESIZE=1).
func (f *Finder) BlockGrown(ctx context.Context, dev, bytes uint64) error {
	name := fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev))
	size := filepath.Join(f.Sys, "dev", "block", name, "size")
	_, err := f.wait(ctx, fmt.Sprintf("disk %s of %d bytes", name, bytes), func() (string, bool, error) {
		b, err := os.ReadFile(size)
		if err != nil {
			return "", false, err
		}
		sectors, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
		return "", sectors*512 >= bytes, err
	})
	return err
}

// NetByPCI returns the name of the network interface at a PCI path, waiting for it.
func (f *Finder) NetByPCI(ctx context.Context, path string) (string, error) {
	return f.wait(ctx, "network interface at PCI path "+path, func() (string, bool, error) {
		dir, ok, err := f.PCIDir(path)
		if !ok || err != nil {
			return "", false, err
		}
		for _, pattern := range []string{"virtio*/net/*", "net/*"} {
			if m, _ := filepath.Glob(filepath.Join(dir, pattern)); len(m) > 0 {
				return filepath.Base(m[0]), true, nil
			}
		}
		return "", false, nil
	})
}

// SerialByName returns the device node of a virtio-serial port, waiting for it.
func (f *Finder) SerialByName(ctx context.Context, name string) (string, error) {
	return f.wait(ctx, "virtio-serial port "+name, func() (string, bool, error) {
		names, err := filepath.Glob(filepath.Join(f.Sys, "class", "virtio-ports", "*", "name"))
		if err != nil {
			return "", false, err
		}
		for _, n := range names {
			b, err := os.ReadFile(n)
			if err == nil && strings.TrimSpace(string(b)) == name {
				return filepath.Join(f.Dev, filepath.Base(filepath.Dir(n))), true, nil
			}
		}
		return "", false, nil
	})
}

// node is the device node of the first match of the patterns.
func (f *Finder) node(patterns ...string) (string, bool, error) {
	for _, p := range patterns {
		m, err := filepath.Glob(p)
		if err != nil {
			return "", false, err
		}
		if len(m) == 0 {
			continue
		}
		path := filepath.Join(f.Dev, filepath.Base(m[0]))
		if ok, err := live(path); ok || err != nil {
			return path, ok, err
		}
	}
	return "", false, nil
}

// live tells whether a device node can be used. The kernel makes the node of a disk
// a moment before the disk (block/genhd.c, device_add_disk); opened in between, it
// says ENXIO. The uevent comes after both.
func live(path string) (bool, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	switch {
	case err == nil:
		return true, file.Close()
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ENXIO):
		return false, nil
	}
	return false, err
}

// wait calls look, and again after every uevent, until it finds something.
func (f *Finder) wait(ctx context.Context, what string, look func() (string, bool, error)) (string, error) {
	if name, ok, err := look(); ok || err != nil {
		return name, err
	}
	ctx, cancel := context.WithTimeout(ctx, f.Timeout)
	defer cancel()
	ev, err := openUevents()
	if err != nil {
		return "", err
	}
	defer ev.Close()
	stop := context.AfterFunc(ctx, func() { _ = ev.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, 16<<10)
	for {
		// Looked for after the socket is open, so that no event falls in between.
		if name, ok, err := look(); ok || err != nil {
			return name, err
		}
		if _, err := ev.Read(buf); err != nil && !errors.Is(err, unix.ENOBUFS) {
			if ctx.Err() != nil {
				return "", fault.New(fault.NotFound, "%s did not appear within %v: %w", what, f.Timeout, ctx.Err())
			}
			return "", fmt.Errorf("%s: uevents: %w", what, err)
		}
	}
}

// openUevents listens to what the kernel says about devices (NETLINK_KOBJECT_UEVENT, group 1).
func openUevents() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("uevents: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("uevents: bind: %w", err)
	}
	return os.NewFile(uintptr(fd), "uevents"), nil
}
