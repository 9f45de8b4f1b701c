// SPDX-License-Identifier: Apache-2.0

package network

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// scanAttempts bounds the repetitions of a dump that the kernel says was
// interrupted by a change (NLM_F_DUMP_INTR).
const scanAttempts = 10

// scan reads the namespace of a handle.
func scan(h *netlink.Handle) (State, error) {
	var s State
	var err error
	for range scanAttempts {
		if s, err = scanOnce(h); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return State{}, fmt.Errorf("scan: %w", err)
	}
	return s, nil
}

func scanOnce(h *netlink.Handle) (State, error) {
	links, err := h.LinkList()
	if err != nil {
		return State{}, fmt.Errorf("list devices: %w", err)
	}
	addrs, err := h.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return State{}, fmt.Errorf("list addresses: %w", err)
	}
	var s State
	for _, l := range links {
		if l.Attrs().Flags&net.FlagLoopback == 0 {
			s.Links = append(s.Links, newLink(l, addrs))
		}
	}
	slices.SortFunc(s.Links, func(a, b Link) int { return cmp.Compare(a.Index, b.Index) })
	routes, err := h.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_MAIN, Type: unix.RTN_UNICAST},
		netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
	if err != nil {
		return State{}, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		s.Routes = append(s.Routes, newRoute(r))
	}
	neighbours, err := h.NeighList(0, netlink.FAMILY_ALL)
	if err != nil {
		return State{}, fmt.Errorf("list neighbours: %w", err)
	}
	for _, n := range neighbours {
		if ip, ok := netip.AddrFromSlice(n.IP); ok && n.State&netlink.NUD_PERMANENT != 0 {
			s.Neighbours = append(s.Neighbours, Neighbour{Link: n.LinkIndex, IP: ip.Unmap(), MAC: n.HardwareAddr, State: n.State, Flags: n.Flags})
		}
	}
	return s, nil
}

func newLink(l netlink.Link, addrs []netlink.Addr) Link {
	a := l.Attrs()
	out := Link{
		Index: a.Index, Name: a.Name, Kind: l.Type(), MAC: a.HardwareAddr, MTU: a.MTU, Ethernet: a.EncapType == "ether",
		Up: a.RawFlags&unix.IFF_UP != 0, Running: a.RawFlags&unix.IFF_RUNNING != 0, NoARP: a.RawFlags&unix.IFF_NOARP != 0, Master: a.MasterIndex,
	}
	if t, ok := l.(*netlink.Tuntap); ok {
		out.MultiQueue = t.Flags&netlink.TUNTAP_MULTI_QUEUE != 0
	}
	for _, ad := range addrs {
		if ad.LinkIndex == a.Index {
			out.Addrs = append(out.Addrs, newAddr(ad, a.HardwareAddr))
		}
	}
	return out
}

func newAddr(a netlink.Addr, mac net.HardwareAddr) Addr {
	p := prefix(a.IPNet)
	return Addr{
		Prefix:    p,
		Kernel:    p.Addr().Is6() && p.Addr().IsLinkLocalUnicast() && (p.Addr() == eui64(mac) || a.Flags&unix.IFA_F_STABLE_PRIVACY != 0),
		Temporary: p.Addr().Is6() && a.Flags&unix.IFA_F_TEMPORARY != 0,
	}
}

// eui64 is the link-local address that the kernel derives from a hardware
// address (RFC 4291, appendix A).
func eui64(mac net.HardwareAddr) netip.Addr {
	if len(mac) != 6 {
		return netip.Addr{}
	}
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: mac[0] ^ 2, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3], 14: mac[4], 15: mac[5]})
}

func prefix(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	ip, _ := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(ip.Unmap(), ones)
}

func newRoute(r netlink.Route) Route {
	out := Route{
		Link: r.LinkIndex, Dest: prefix(r.Dst), Priority: r.Priority, Scope: uint8(r.Scope), MTU: r.MTU,
		Kernel: r.Protocol == unix.RTPROT_KERNEL, OnLink: r.Flags&unix.RTNH_F_ONLINK != 0,
	}
	if !out.Dest.IsValid() {
		out.Dest = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if r.Family == netlink.FAMILY_V6 {
			out.Dest = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
	}
	if ip, ok := netip.AddrFromSlice(r.Gw); ok {
		out.Gateway = ip.Unmap()
	}
	if ip, ok := netip.AddrFromSlice(r.Src); ok {
		out.Source = ip.Unmap()
	}
	switch {
	case len(r.MultiPath) > 0:
		out.Unsupported = "several next hops"
	case r.Via != nil:
		out.Unsupported = "a gateway of another address family"
	case r.Encap != nil:
		out.Unsupported = "an encapsulation"
	case r.Tos != 0:
		out.Unsupported = "a type of service"
	}
	return out
}
