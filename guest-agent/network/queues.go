// SPDX-License-Identifier: Apache-2.0

package network

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// channels is the kernel's struct ethtool_channels (include/uapi/linux/ethtool.h).
type channels struct {
	cmd                                 uint32
	maxRx, maxTx, maxOther, maxCombined uint32
	rx, tx, other, combined             uint32
}

// ethtoolRequest is a struct ifreq whose union is a pointer.
type ethtoolRequest struct {
	name [unix.IFNAMSIZ]byte
	data unsafe.Pointer
	_    [16]byte
}

// SpreadQueues has each interface use as many pairs of queues as there are CPUs, or
// as many as it has if those are fewer; none uses fewer than before. virtio-net counts
// CPUs when it finds its device (drivers/net/virtio_net.c, virtnet_probe), and some come
// up later.
func (c Config) SpreadQueues() error {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return fmt.Errorf("queues: %w", os.NewSyscallError("sched_getaffinity", err))
	}
	cpus := uint32(set.Count())
	if cpus == 1 {
		return nil
	}
	list, err := c.ListInterfaces()
	if err != nil {
		return err
	}
	var errs []error
	for _, i := range list {
		if err := spreadQueues(i.Name, cpus); err != nil {
			errs = append(errs, fmt.Errorf("interface %s: queues: %w", i.Name, err))
		}
	}
	return errors.Join(errs...)
}

// spreadQueues: see SpreadQueues. Many kinds of interfaces have no such thing.
func spreadQueues(name string, cpus uint32) error {
	ch := channels{cmd: unix.ETHTOOL_GCHANNELS}
	err := ethtool(name, &ch)
	want := min(ch.maxCombined, cpus)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP) || err == nil && want <= ch.combined:
		return nil
	case err != nil:
		return err
	}
	ch.cmd, ch.combined = unix.ETHTOOL_SCHANNELS, want
	return ethtool(name, &ch)
}

func ethtool(name string, ch *channels) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r := ethtoolRequest{data: unsafe.Pointer(ch)}
	copy(r.name[:], name)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&r))); errno != 0 {
		return errno
	}
	return nil
}
