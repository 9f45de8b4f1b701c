// SPDX-License-Identifier: Apache-2.0

// Package network configures the guest's interfaces, addresses, routes and
// neighbours as the host says.
package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/protocols/typespb"
)

// Config configures the network namespace of the thread that calls it.
type Config struct {
	// HotplugTimeout bounds the wait for an interface.
	HotplugTimeout time.Duration
	// ByPCI finds an interface's name by its PCI path.
	ByPCI func(ctx context.Context, path string) (string, error)
}

// link is one interface.
type link struct {
	index int32
	name  string
	mac   net.HardwareAddr
	mtu   uint32
	flags uint32
	stats []byte
}

const ifInfoLen = 16 // struct ifinfomsg

func ifInfo(index int32, flags, change uint32) []byte {
	b := []byte{unix.AF_UNSPEC, 0, 0, 0}
	b = native.AppendUint32(b, uint32(index))
	b = native.AppendUint32(b, flags)
	return native.AppendUint32(b, change)
}

func (c *conn) links() ([]link, error) {
	msgs, err := c.do(unix.RTM_GETLINK, unix.NLM_F_DUMP, ifInfo(0, 0, 0))
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var out []link
	for _, m := range msgs {
		if m.kind != unix.RTM_NEWLINK || len(m.body) < ifInfoLen {
			continue
		}
		a := attrs(m.body, ifInfoLen)
		l := link{
			index: int32(native.Uint32(m.body[4:])), flags: native.Uint32(m.body[8:]),
			name: cString(a[unix.IFLA_IFNAME]), mac: a[unix.IFLA_ADDRESS], stats: a[unix.IFLA_STATS64],
		}
		if mtu := a[unix.IFLA_MTU]; len(mtu) == 4 {
			l.mtu = native.Uint32(mtu)
		}
		out = append(out, l)
	}
	return out, nil
}

// withLinks runs f with a socket and the interfaces that there are.
func withLinks(f func(*conn, []link) error) error {
	nl, err := open()
	if err != nil {
		return err
	}
	defer nl.close()
	ls, err := nl.links()
	if err != nil {
		return err
	}
	return f(nl, ls)
}

func cString(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

// find waits for the interface that the host means: by its place on the PCI bus
// when that is given, since a restored machine's has its template's address;
// else by hardware address.
func (c Config) find(ctx context.Context, nl *conn, want *typespb.Interface) (link, error) {
	match := func(l link) bool { return false }
	var what string
	switch {
	case want.DevicePath != "" && c.ByPCI != nil:
		name, err := c.ByPCI(ctx, want.DevicePath)
		if err != nil {
			return link{}, err
		}
		what, match = name, func(l link) bool { return l.name == name }
	case want.HwAddr != "":
		mac, err := net.ParseMAC(want.HwAddr)
		if err != nil {
			return link{}, fault.New(fault.InvalidArgument, "interface.hwAddr: %w", err)
		}
		what, match = want.HwAddr, func(l link) bool { return bytes.Equal(l.mac, mac) }
	default:
		return link{}, fault.New(fault.InvalidArgument, "interface %q: neither devicePath nor hwAddr is given", want.Name)
	}
	var found link
	ok, err := waitLink(ctx, c.HotplugTimeout, func() (bool, error) {
		ls, err := nl.links()
		for _, l := range ls {
			if match(l) {
				found = l
				return true, nil
			}
		}
		return false, err
	})
	if err == nil && !ok {
		err = fault.New(fault.NotFound, "network interface %s did not appear within %v", what, c.HotplugTimeout)
	}
	return found, err
}

// UpdateInterface gives one interface its name, hardware address, MTU, flags and
// addresses, replacing those it had, and brings it up. It returns the result.
func (c Config) UpdateInterface(ctx context.Context, want *typespb.Interface) (*typespb.Interface, error) {
	if want.GetName() == "" || len(want.Name) >= unix.IFNAMSIZ || strings.ContainsAny(want.Name, "/ ") {
		return nil, fault.New(fault.InvalidArgument, "interface.name %q: want 1 to %d characters without / and space", want.GetName(), unix.IFNAMSIZ-1)
	}
	nl, err := open()
	if err != nil {
		return nil, err
	}
	defer nl.close()
	l, err := c.find(ctx, nl, want)
	if err != nil {
		return nil, err
	}
	if err := nl.makeRoom(want.Name, l.index); err != nil {
		return nil, err
	}
	if err := nl.setLink(l, want); err != nil {
		return nil, fmt.Errorf("interface %s: %w", want.Name, err)
	}
	noDAD(want.Name)
	if err := nl.setAddrs(l.index, want.IPAddresses); err != nil {
		return nil, fmt.Errorf("interface %s: %w", want.Name, err)
	}
	// Up comes last: a route or a workload never sees the interface half done.
	const keep = unix.IFF_NOARP | unix.IFF_PROMISC | unix.IFF_ALLMULTI
	flags := unix.IFF_UP | want.RawFlags&keep
	if _, err := nl.do(unix.RTM_NEWLINK, 0, ifInfo(l.index, flags, unix.IFF_UP|keep)); err != nil {
		return nil, fmt.Errorf("interface %s: bring up: %w", want.Name, err)
	}
	return nl.describe(l.index)
}

// noDAD lets the link-local address that the kernel makes be used at once, as
// addresses from the host are: the host owns the address plan. A kernel without
// IPv6 has no such file.
func noDAD(name string) {
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/accept_dad", []byte("0"), 0)
}

// makeRoom renames another interface that has the wanted name.
func (c *conn) makeRoom(name string, index int32) error {
	ls, err := c.links()
	if err != nil {
		return err
	}
	l, err := byName(ls, name)
	if err != nil || l.index == index {
		return nil //nolint:nilerr // nobody has it
	}
	other := "kata" + strconv.Itoa(int(l.index))
	msg := attr(ifInfo(l.index, 0, unix.IFF_UP), unix.IFLA_IFNAME, append([]byte(other), 0))
	if _, err := c.do(unix.RTM_NEWLINK, 0, msg); err != nil {
		return fmt.Errorf("rename interface %s to %s: %w", name, other, err)
	}
	return nil
}

func byName(ls []link, name string) (link, error) {
	if i := slices.IndexFunc(ls, func(l link) bool { return l.name == name }); i >= 0 {
		return ls[i], nil
	}
	return link{}, fault.New(fault.NotFound, "device %q: no such interface", name)
}

// setLink takes the interface down only for a new name or hardware address: that
// costs it its routes.
func (c *conn) setLink(l link, want *typespb.Interface) error {
	down, set := uint32(0), []byte(nil)
	if l.name != want.Name {
		down, set = unix.IFF_UP, attr(set, unix.IFLA_IFNAME, append([]byte(want.Name), 0))
	}
	if want.Mtu != 0 && uint32(want.Mtu) != l.mtu {
		set = attr(set, unix.IFLA_MTU, u32(uint32(want.Mtu)))
	}
	if want.HwAddr != "" {
		mac, err := net.ParseMAC(want.HwAddr)
		if err != nil {
			return fault.New(fault.InvalidArgument, "hwAddr: %w", err)
		}
		if !bytes.Equal(mac, l.mac) {
			down, set = unix.IFF_UP, attr(set, unix.IFLA_ADDRESS, mac)
		}
	}
	if set == nil {
		return nil
	}
	if _, err := c.do(unix.RTM_NEWLINK, 0, append(ifInfo(l.index, 0, down), set...)); err != nil {
		return fmt.Errorf("set name, MTU %d and address %q: %w", want.Mtu, want.HwAddr, err)
	}
	return nil
}

const ifAddrLen = 8 // struct ifaddrmsg

func (c *conn) addrs(index int32) ([]netip.Prefix, error) {
	msgs, err := c.do(unix.RTM_GETADDR, unix.NLM_F_DUMP, make([]byte, ifAddrLen))
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var out []netip.Prefix
	for _, m := range msgs {
		if m.kind != unix.RTM_NEWADDR || len(m.body) < ifAddrLen || int32(native.Uint32(m.body[4:])) != index {
			continue
		}
		a := attrs(m.body, ifAddrLen)
		raw := a[unix.IFA_LOCAL]
		if raw == nil {
			raw = a[unix.IFA_ADDRESS]
		}
		if ip, ok := netip.AddrFromSlice(raw); ok {
			out = append(out, netip.PrefixFrom(ip, int(m.body[1])))
		}
	}
	return out, nil
}

// setAddrs leaves an address that stays as it is.
func (c *conn) setAddrs(index int32, want []*typespb.IPAddress) error {
	var keep []netip.Prefix
	for _, w := range want {
		p, err := parsePrefix(w)
		if err != nil {
			return err
		}
		keep = append(keep, p)
	}
	old, err := c.addrs(index)
	if err != nil {
		return err
	}
	for _, p := range old {
		if slices.Contains(keep, p) || p.Addr().Is6() && p.Addr().IsLinkLocalUnicast() { // the kernel's own
			continue
		}
		// EADDRNOTAVAIL: it went with the primary one of its network.
		if _, err := c.do(unix.RTM_DELADDR, 0, addrMsg(index, p)); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %v: %w", p, err)
		}
	}
	for _, p := range keep { // all: one may have gone with its primary
		if _, err := c.do(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, addrMsg(index, p)); err != nil {
			return fmt.Errorf("add address %v: %w", p, err)
		}
	}
	return nil
}

func addrMsg(index int32, p netip.Prefix) []byte {
	fam, flags := byte(unix.AF_INET), byte(0)
	if p.Addr().Is6() {
		// The host owns the address plan: waiting for duplicates delays the first packet.
		fam, flags = unix.AF_INET6, unix.IFA_F_NODAD
	}
	b := []byte{fam, byte(p.Bits()), flags, unix.RT_SCOPE_UNIVERSE}
	b = native.AppendUint32(b, uint32(index))
	b = attr(b, unix.IFA_LOCAL, p.Addr().AsSlice())
	return attr(b, unix.IFA_ADDRESS, p.Addr().AsSlice())
}

func parsePrefix(a *typespb.IPAddress) (netip.Prefix, error) {
	ip, err := netip.ParseAddr(a.GetAddress())
	if err != nil {
		return netip.Prefix{}, fault.New(fault.InvalidArgument, "address: %w", err)
	}
	bits, err := strconv.Atoi(a.GetMask())
	if err != nil || bits < 0 || bits > ip.BitLen() {
		return netip.Prefix{}, fault.New(fault.InvalidArgument, "address %s: mask %q: want a prefix length from 0 to %d", ip, a.GetMask(), ip.BitLen())
	}
	return netip.PrefixFrom(ip, bits), nil
}

func (c *conn) describe(index int32) (*typespb.Interface, error) {
	ls, err := c.links()
	if err != nil {
		return nil, err
	}
	for _, l := range ls {
		if l.index == index {
			return c.toWire(l)
		}
	}
	return nil, fault.New(fault.NotFound, "interface %d is gone", index)
}

func (c *conn) toWire(l link) (*typespb.Interface, error) {
	ps, err := c.addrs(l.index)
	if err != nil {
		return nil, err
	}
	out := &typespb.Interface{Device: l.name, Name: l.name, HwAddr: l.mac.String(), Mtu: uint64(l.mtu), RawFlags: l.flags}
	for _, p := range ps {
		out.IPAddresses = append(out.IPAddresses, &typespb.IPAddress{
			Family: familyOf(p.Addr()), Address: p.Addr().String(), Mask: strconv.Itoa(p.Bits()),
		})
	}
	return out, nil
}

func familyOf(ip netip.Addr) typespb.IPFamily {
	if ip.Is6() {
		return typespb.IPFamily_v6
	}
	return typespb.IPFamily_v4
}

// ListInterfaces describes every interface.
func (c Config) ListInterfaces() ([]*typespb.Interface, error) {
	var out []*typespb.Interface
	err := withLinks(func(nl *conn, ls []link) error {
		for _, l := range ls {
			w, err := nl.toWire(l)
			if err != nil {
				return err
			}
			out = append(out, w)
		}
		return nil
	})
	return out, err
}

// Stats counts what each interface but loopback has carried (struct rtnl_link_stats64).
func (c Config) Stats() ([]*agentpb.NetworkStats, error) {
	var out []*agentpb.NetworkStats
	err := withLinks(func(_ *conn, ls []link) error {
		for _, l := range ls {
			if l.flags&unix.IFF_LOOPBACK != 0 || len(l.stats) < 64 {
				continue
			}
			n := func(i int) uint64 { return native.Uint64(l.stats[8*i:]) }
			out = append(out, &agentpb.NetworkStats{
				Name: l.name, RxPackets: n(0), TxPackets: n(1), RxBytes: n(2), TxBytes: n(3),
				RxErrors: n(4), TxErrors: n(5), RxDropped: n(6), TxDropped: n(7),
			})
		}
		return nil
	})
	return out, err
}
