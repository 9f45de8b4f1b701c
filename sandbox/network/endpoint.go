// SPDX-License-Identifier: Apache-2.0

package network

import (
	"fmt"
	"net"
	"os"
	"strconv"

	"github.com/kata-v2/kata/hypervisor"
)

// tapPrefix, with the index of the device it serves, is the name of our own
// devices in the pod's namespace.
const tapPrefix = "katatap"

// endpoint is one connected device.
type endpoint struct {
	Endpoint
	net  *Network
	tap  int // index of our own device, 0 when there is none
	taps []*os.File
	undo undoList
}

// attach connects a device. On error nothing is left.
func (n *Network) attach(p Endpoint) (*endpoint, error) {
	e := &endpoint{Endpoint: p, net: n}
	var err error
	switch p.Method {
	case MethodRedirect:
		err = e.connectTap()
	case MethodMacvtap:
		err = e.connectMacvtap()
	case MethodTap:
		queues := 1
		if p.Link.MultiQueue {
			queues = n.o.Queues
		}
		e.taps, err = n.ns.openTap(p.Link.Name, queues, p.Link.MultiQueue, false)
	default:
		err = fmt.Errorf("method %q is not known", p.Method)
	}
	if err != nil {
		return nil, e.abandon(err)
	}
	return e, nil
}

// abandon undoes a connection of which no machine knows.
func (e *endpoint) abandon(err error) error {
	closeFiles(e.taps)
	e.taps = nil
	if uerr := e.undo.run(); uerr != nil {
		e.net.o.Log.Error("undo the connection of a network device", "device", e.Link.Name, "error", uerr)
	}
	return err
}

// nic passes the device's queues on to a machine.
func (e *endpoint) nic() (hypervisor.NIC, error) {
	mac, err := net.ParseMAC(e.Guest.HwAddr)
	if err != nil {
		return hypervisor.NIC{}, err
	}
	nic := hypervisor.NIC{ID: e.id(), MAC: mac, Taps: e.taps}
	if !e.net.o.NoVhost {
		if nic.Vhost, err = openVhost(len(e.taps)); err != nil {
			return hypervisor.NIC{}, err
		}
	}
	e.taps = nil
	return nic, nil
}

// id names the machine's device.
func (e *endpoint) id() string { return "nic" + strconv.Itoa(e.Link.Index) }

// setMTU follows a change of the device's.
func (e *endpoint) setMTU(mtu int) error {
	if e.tap == 0 {
		return nil
	}
	tap, err := e.net.ns.nl.LinkByIndex(e.tap)
	if err == nil {
		err = e.net.ns.nl.LinkSetMTU(tap, mtu)
	}
	if err != nil {
		return fmt.Errorf("MTU %d of network device %s: %w", mtu, e.Link.Name, err)
	}
	return nil
}
