// SPDX-License-Identifier: Apache-2.0

package hypervisor

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// CloseDevices closes the files of shares, NICs and disks that no backend has taken over.
func (c Config) CloseDevices() {
	for _, s := range c.Shares {
		s.Conn.Close()
	}
	for _, n := range c.NICs {
		n.Close()
	}
	for _, d := range c.Disks {
		d.Close()
	}
}

// Dup returns the same machine with NICs and disks whose files are its own, and
// without shares: a connection serves one machine only.
func (c Config) Dup() (Config, error) {
	d := c
	d.Shares, d.NICs, d.Disks = nil, nil, nil
	var err error
	dup := func(f *os.File) *os.File {
		fd, derr := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if derr != nil && err == nil {
			err = fmt.Errorf("%s: %w", f.Name(), os.NewSyscallError("dup", derr))
		}
		return os.NewFile(uintptr(fd), f.Name()) // nil for a bad descriptor, which every method takes
	}
	for _, n := range c.NICs {
		own := NIC{ID: n.ID, MAC: n.MAC}
		for _, f := range n.Taps {
			own.Taps = append(own.Taps, dup(f))
		}
		for _, f := range n.Vhost {
			own.Vhost = append(own.Vhost, dup(f))
		}
		d.NICs = append(d.NICs, own)
	}
	for _, disk := range c.Disks {
		own := disk
		own.Parts = nil
		for _, p := range disk.Parts {
			p.File = dup(p.File)
			own.Parts = append(own.Parts, p)
		}
		d.Disks = append(d.Disks, own)
	}
	if err != nil {
		d.CloseDevices()
		return Config{}, fmt.Errorf("devices: %w", err)
	}
	return d, nil
}
