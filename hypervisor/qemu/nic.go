// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/kata-v2/kata/hypervisor"
)

// Slots of the root bus, fixed so that a device's place does not depend on what
// else the machine has. Below are the devices that QEMU places itself, 0x1f is q35's own.
const (
	firstPortSlot = 0x08
	portSlots     = firstNICSlot - firstPortSlot
	maxPorts      = portSlots * 8 // a slot has eight functions
	firstNICSlot  = 0x10
	maxNICs       = 0x1f - firstNICSlot
)

// portID names a root port: the root bus itself takes no device while the machine runs.
func portID(i int) string { return "port" + strconv.Itoa(i) }

// ports is the number of root ports of a machine: its disks lie in the first.
func ports(c hypervisor.Config) int { return max(c.HotplugPorts, 0) + len(c.Disks) }

// portAddress is a root port's slot and function. One port to a slot as long as
// there are slots, then further functions of the slots.
func portAddress(i int) (slot, function int) { return firstPortSlot + i%portSlots, i / portSlots }

// portPlace is the place in the guest of the device in a root port: the port's
// slot, with its function where that is not 0, and the slot below it.
func portPlace(i int) string {
	slot, function := portAddress(i)
	if function == 0 {
		return fmt.Sprintf("%02x/00", slot)
	}
	return fmt.Sprintf("%02x.%x/00", slot, function)
}

// portArguments are the root ports' part of the command line.
func portArguments(n int) (a []string) {
	for i := range n {
		slot, function := portAddress(i)
		device := fmt.Sprintf("pcie-root-port,id=%s,bus=pcie.0,addr=%#x,chassis=%d,slot=%d,io-reserve=0", portID(i), slot, i+1, i+1)
		if n > portSlots {
			device = fmt.Sprintf("pcie-root-port,id=%s,bus=pcie.0,addr=%#x.%d,multifunction=on,chassis=%d,slot=%d,io-reserve=0", portID(i), slot, function, i+1, i+1)
		}
		a = append(a, "-device", device)
	}
	return a
}

// nicFDs are the numbers of a NIC's files in QEMU.
type nicFDs struct{ taps, vhost []int }

// inheritNICs checks the NICs and passes their files on; they belong to the
// backend from now on, also when it fails.
func (s *start) inheritNICs() {
	for _, n := range s.c.NICs {
		var l nicFDs
		for _, f := range n.Taps {
			l.taps = append(l.taps, s.inherit.add(f))
		}
		for _, f := range n.Vhost {
			l.vhost = append(l.vhost, s.inherit.add(f))
		}
		s.l.NICs = append(s.l.NICs, l)
	}
}

func checkNICs(nics []hypervisor.NIC) error {
	if len(nics) > maxNICs {
		return fmt.Errorf("%d NICs: at most %d have a place on the machine's root bus", len(nics), maxNICs)
	}
	for _, n := range nics {
		if err := checkNIC(n); err != nil {
			return err
		}
	}
	return nil
}

// alphanumeric tells whether an ID is of ASCII letters and digits.
func alphanumeric(id string) bool {
	return id != "" && strings.TrimFunc(id, func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
	}) == ""
}

func checkNIC(n hypervisor.NIC) error {
	switch {
	case !alphanumeric(n.ID):
		return fmt.Errorf("NIC ID %q: want letters and digits", n.ID)
	case len(n.MAC) != 6:
		return fmt.Errorf("NIC %s: MAC %q: want 6 bytes", n.ID, n.MAC)
	case len(n.Taps) == 0:
		return fmt.Errorf("NIC %s: no tap", n.ID)
	case len(n.Vhost) != 0 && len(n.Vhost) != len(n.Taps):
		return fmt.Errorf("NIC %s: %d vhost files for %d taps: want one for each, or none", n.ID, len(n.Vhost), len(n.Taps))
	}
	return nil
}

// plugsNICs tells whether the machine's NICs are plugged into its root ports, after
// those of its disks, before a restored guest goes on. A guest that is told of other
// devices by plugs would be slowed by a scan of the bus beside them, which is how it finds what
// lies on the root bus; that is for more NICs than there are ports, of which one
// stays free for what comes later.
func plugsNICs(c hypervisor.Config) bool {
	return c.Restore != nil && !c.Whole && len(c.NICs) < c.HotplugPorts
}

// nicDevice is a NIC in a root port, as device_add takes it.
func nicDevice(n hypervisor.NIC, port int) map[string]any {
	device := map[string]any{
		"driver": "virtio-net-pci", "id": n.ID, "netdev": netdevID(n.ID), "mac": n.MAC.String(), "bus": portID(port), "addr": "0",
		"romfile": "", "disable-legacy": "on",
	}
	if q := len(n.Taps); q > 1 {
		device["mq"], device["vectors"] = true, vectors(q)
	}
	return device
}

// nicArguments are a NIC's part of the command line.
func nicArguments(n hypervisor.NIC, l layout, i int) []string {
	fds := l.NICs[i]
	netdev := "tap,id=" + netdevID(n.ID) + ",fds=" + join(fds.taps)
	if len(fds.vhost) > 0 {
		netdev += ",vhost=on,vhostfds=" + join(fds.vhost)
	}
	device := fmt.Sprintf("%s,id=%s,netdev=%s,mac=%s", l.device("virtio-net"), n.ID, netdevID(n.ID), n.MAC)
	if l.Machine != MicroVM { // there a device has neither a place nor more than one interrupt
		device += fmt.Sprintf(",addr=%#x,romfile=,disable-legacy=on", firstNICSlot+i)
	}
	if q := len(fds.taps); q > 1 {
		device += ",mq=on"
		if l.Machine != MicroVM {
			device += ",vectors=" + strconv.Itoa(vectors(q))
		}
	}
	return []string{"-netdev", netdev, "-device", device}
}

func netdevID(nic string) string { return "net" + nic }

// vectors are the interrupts of a NIC with several queue pairs: one for each
// queue, one for the control queue, one for changes of the configuration.
func vectors(queues int) int { return 2*queues + 2 }

func join(fds []int) string {
	var s []string
	for _, fd := range fds {
		s = append(s, strconv.Itoa(fd))
	}
	return strings.Join(s, ":")
}
