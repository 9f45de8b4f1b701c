// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/vsock"
)

// vsockDevice is the host's end of the machine's vsock and what QEMU needs of it.
type vsockDevice struct {
	vsock.Device
	backend hypervisor.VsockBackend
	cid     uint32
	file    *os.File      // for QEMU
	serial  *vsock.Serial // the Device, when it is one
}

// hybridSocket is the name, in the machine's directory, of the socket by which
// tools of root reach the guest: "CONNECT <port>\n", "OK <port>\n", then the stream.
const hybridSocket = "vsock.sock"

func openVsock(c hypervisor.Config, log *slog.Logger) (*vsockDevice, error) {
	want, dir := c.Vsock, c.Dir
	switch want {
	case hypervisor.VsockSerial:
		return openSerial(c, log)
	case "", hypervisor.VsockAuto:
		if vsock.KernelAvailable() {
			return openKernelVsock()
		}
		return openUserVsock(dir, log)
	case hypervisor.VsockVhost:
		return openKernelVsock()
	case hypervisor.VsockVhostUser:
		return openUserVsock(dir, log)
	}
	return nil, fmt.Errorf("vsock backend (hypervisor.qemu.vsock) is %q: must be %q, %q or %q",
		want, hypervisor.VsockAuto, hypervisor.VsockVhost, hypervisor.VsockVhostUser)
}

func openKernelVsock() (*vsockDevice, error) {
	d, err := vsock.NewKernel()
	if err != nil {
		return nil, err
	}
	return &vsockDevice{Device: d, backend: hypervisor.VsockVhost, cid: d.GuestCID(), file: d.VhostFile()}, nil
}

func openUserVsock(dir string, log *slog.Logger) (*vsockDevice, error) {
	d, err := vsock.NewUser(vsock.UserConfig{GuestCID: guestCID, HybridPath: filepath.Join(dir, hybridSocket), Logger: log})
	if err != nil {
		return nil, err
	}
	return &vsockDevice{Device: d, backend: hypervisor.VsockVhostUser, cid: guestCID, file: d.QEMUFile()}, nil
}

func openSerial(c hypervisor.Config, log *slog.Logger) (*vsockDevice, error) {
	d, err := vsock.NewSerial(vsock.SerialConfig{
		Restored: c.Restore != nil, Same: c.Whole, HybridPath: filepath.Join(c.Dir, hybridSocket), Logger: log,
		// A scan finds what lies on the root bus. What is plugged the guest is told,
		// and whoever uses it waits for it.
		Scan: !c.Whole && len(c.NICs) > 0 && !plugsNICs(c),
	})
	if err != nil {
		return nil, err
	}
	return &vsockDevice{Device: d, backend: hypervisor.VsockSerial, file: d.QEMUFile(), serial: d}, nil
}

// portOf is the vsock port of a listener's address.
func portOf(a net.Addr) uint32 {
	if v, ok := a.(vsock.Addr); ok {
		return v.Port
	}
	return 0
}
