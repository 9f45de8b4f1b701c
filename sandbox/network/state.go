// SPDX-License-Identifier: Apache-2.0

package network

import (
	"net"
	"net/netip"
)

// State is what a network namespace holds, as far as it matters here.
type State struct {
	// Links are all devices but loopback, by ascending index.
	Links []Link
	// Routes are the unicast routes of the main table, in the kernel's order.
	Routes []Route
	// Neighbours are the permanent entries of the ARP and NDP tables.
	Neighbours []Neighbour
}

// Link is one device.
type Link struct {
	Index int
	Name  string
	// Kind is what the kernel calls it: "veth", "macvlan", "ipvlan", "tuntap", "device" for hardware.
	Kind string
	MAC  net.HardwareAddr
	MTU  int
	// Ethernet tells whether its frames have Ethernet headers.
	Ethernet bool
	Up       bool
	// Running is the carrier's state; a tap has it while a program holds it open.
	Running bool
	NoARP   bool
	// Master is the index of the bridge or bond that the device is a port of, 0 for none.
	Master int
	// MultiQueue tells whether a tap was made with several queues in mind.
	MultiQueue bool
	Addrs      []Addr
}

// Addr is one address of a device.
type Addr struct {
	netip.Prefix
	// Kernel marks a link-local address that the kernel made, as the guest's will.
	Kernel bool
	// Temporary marks a privacy address (RFC 8981), which comes and goes.
	Temporary bool
}

// Route is one route.
type Route struct {
	// Link is the index of its device; 0 for a route over several next hops.
	Link int
	// Dest is 0.0.0.0/0 or ::/0 for a default route.
	Dest            netip.Prefix
	Gateway, Source netip.Addr
	// Priority is the metric: of two routes with the same Dest the lower one is used.
	Priority int
	Scope    uint8
	MTU      int
	// Kernel marks a route that the kernel made for an address.
	Kernel bool
	// OnLink says that the gateway need not be in any network of the device.
	OnLink bool
	// Unsupported says what the guest's protocol cannot express of it, empty if nothing.
	Unsupported string
}

// Neighbour is one permanent entry of a neighbour table.
type Neighbour struct {
	Link  int
	IP    netip.Addr
	MAC   net.HardwareAddr
	State int
	Flags int
}
