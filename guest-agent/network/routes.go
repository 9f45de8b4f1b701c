// SPDX-License-Identifier: Apache-2.0

package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols/typespb"
)

// route is one entry of the main table.
type route struct {
	family, scope, proto byte
	flags                uint32
	dst                  netip.Prefix // zero: the default route
	gateway, source      netip.Addr
	oif                  int32
	mtu                  uint32
}

const rtMsgLen = 12 // struct rtmsg

func (r route) message() []byte {
	bits := byte(0)
	if r.dst.IsValid() {
		bits = byte(r.dst.Bits())
	}
	b := []byte{r.family, bits, 0, 0, unix.RT_TABLE_MAIN, r.proto, r.scope, unix.RTN_UNICAST}
	b = native.AppendUint32(b, r.flags)
	if bits > 0 {
		b = attr(b, unix.RTA_DST, r.dst.Addr().AsSlice())
	}
	if r.gateway.IsValid() {
		b = attr(b, unix.RTA_GATEWAY, r.gateway.AsSlice())
	}
	if r.source.IsValid() {
		b = attr(b, unix.RTA_PREFSRC, r.source.AsSlice())
	}
	b = attr(b, unix.RTA_OIF, u32(uint32(r.oif)))
	if r.mtu != 0 {
		b = attr(b, unix.RTA_METRICS, attr(nil, unix.RTAX_MTU, u32(r.mtu)))
	}
	return b
}

func (c *conn) routes() ([]route, error) {
	msgs, err := c.do(unix.RTM_GETROUTE, unix.NLM_F_DUMP, make([]byte, rtMsgLen))
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var out []route
	for _, m := range msgs {
		if m.kind != unix.RTM_NEWROUTE || len(m.body) < rtMsgLen {
			continue
		}
		b := m.body
		if b[4] != unix.RT_TABLE_MAIN || b[7] != unix.RTN_UNICAST {
			continue
		}
		if r, ok := parseRoute(b); ok {
			out = append(out, r)
		}
	}
	return out, nil
}

func parseRoute(b []byte) (route, bool) {
	r := route{family: b[0], proto: b[5], scope: b[6], flags: native.Uint32(b[8:])}
	if r.family != unix.AF_INET && r.family != unix.AF_INET6 {
		return r, false
	}
	if r.flags&unix.RTM_F_CLONED != 0 {
		return r, false
	}
	a := attrs(b, rtMsgLen)
	if ip, ok := netip.AddrFromSlice(a[unix.RTA_DST]); ok {
		r.dst = netip.PrefixFrom(ip, int(b[1]))
	}
	r.gateway, _ = netip.AddrFromSlice(a[unix.RTA_GATEWAY])
	r.source, _ = netip.AddrFromSlice(a[unix.RTA_PREFSRC])
	if oif := a[unix.RTA_OIF]; len(oif) == 4 {
		r.oif = int32(native.Uint32(oif))
	}
	if mtu := attrs(a[unix.RTA_METRICS], 0)[unix.RTAX_MTU]; len(mtu) == 4 {
		r.mtu = native.Uint32(mtu)
	}
	return r, true
}

// UpdateRoutes replaces the routes of the main table by want, and returns the
// table. Routes of loopback and those the kernel made for addresses stay, and one
// that is wanted still is not taken away meanwhile.
func (c Config) UpdateRoutes(want []*typespb.Route) (out []*typespb.Route, err error) {
	err = withLinks(func(nl *conn, ls []link) error {
		var add []route
		for i, w := range want {
			r, err := fromWire(w, ls)
			if err != nil {
				return fmt.Errorf("route %d: %w", i, err)
			}
			add = append(add, r)
		}
		// A gateway must be reachable before it is named.
		slices.SortStableFunc(add, func(a, b route) int { return rank(a) - rank(b) })
		for _, r := range add {
			if _, err := nl.do(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, r.message()); err != nil {
				return fmt.Errorf("add route to %s by %v: %w", destText(r), r.gateway, err)
			}
		}
		if err := nl.clearRoutes(ls, add); err != nil {
			return err
		}
		out, err = nl.listRoutes(ls)
		return err
	})
	return out, err
}

func rank(r route) int {
	if r.gateway.IsValid() {
		return 1
	}
	return 0
}

// clearRoutes removes what is not among keep.
func (c *conn) clearRoutes(ls []link, keep []route) error {
	old, err := c.routes()
	if err != nil {
		return err
	}
	for _, r := range old {
		i := slices.IndexFunc(ls, func(l link) bool { return l.index == r.oif })
		if r.proto == unix.RTPROT_KERNEL || i < 0 || ls[i].flags&unix.IFF_LOOPBACK != 0 ||
			slices.ContainsFunc(keep, func(k route) bool { return k.is(r) }) {
			continue
		}
		// ESRCH: it went with another one.
		if _, err := c.do(unix.RTM_DELROUTE, 0, r.message()); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove route to %s: %w", destText(r), err)
		}
	}
	return nil
}

// is tells whether the kernel's route r is the wanted one.
func (want route) is(r route) bool {
	return want.family == r.family && want.dst == r.dst && want.gateway == r.gateway && want.oif == r.oif &&
		(want.source == r.source || !want.source.IsValid()) && want.mtu == r.mtu
}

func fromWire(w *typespb.Route, ls []link) (route, error) {
	r := route{family: unix.AF_INET, scope: byte(w.Scope), proto: unix.RTPROT_STATIC, flags: w.Flags, mtu: w.Mtu}
	if w.Family == typespb.IPFamily_v6 {
		r.family = unix.AF_INET6
	}
	l, err := byName(ls, w.Device)
	if err != nil {
		return r, err
	}
	r.oif = l.index
	if w.Dest != "" && w.Dest != "default" {
		if r.dst, err = netip.ParsePrefix(w.Dest); err != nil {
			ip, aerr := netip.ParseAddr(w.Dest)
			if aerr != nil {
				return r, fault.New(fault.InvalidArgument, "dest: %w", err)
			}
			r.dst = netip.PrefixFrom(ip, ip.BitLen())
		}
		r.dst = r.dst.Masked()
	}
	if r.gateway, err = optionalAddr(w.Gateway); err != nil {
		return r, fault.New(fault.InvalidArgument, "gateway: %w", err)
	}
	if r.source, err = optionalAddr(w.Source); err != nil {
		return r, fault.New(fault.InvalidArgument, "source: %w", err)
	}
	for _, ip := range []netip.Addr{r.dst.Addr(), r.gateway, r.source} {
		if ip.IsValid() && ip.Is6() != (r.family == unix.AF_INET6) {
			return r, fault.New(fault.InvalidArgument, "address %v is not of the route's family", ip)
		}
	}
	return r, nil
}

func optionalAddr(s string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	return netip.ParseAddr(s)
}

func destText(r route) string {
	if !r.dst.IsValid() {
		return "default"
	}
	return r.dst.String()
}

func (c *conn) listRoutes(ls []link) ([]*typespb.Route, error) {
	rs, err := c.routes()
	if err != nil {
		return nil, err
	}
	var out []*typespb.Route
	for _, r := range rs {
		w := &typespb.Route{Scope: uint32(r.scope), Flags: r.flags, Mtu: r.mtu}
		if r.family == unix.AF_INET6 {
			w.Family = typespb.IPFamily_v6
		}
		if r.dst.IsValid() {
			w.Dest = r.dst.String()
		}
		if r.gateway.IsValid() {
			w.Gateway = r.gateway.String()
		}
		if r.source.IsValid() {
			w.Source = r.source.String()
		}
		for _, l := range ls {
			if l.index == r.oif {
				w.Device = l.name
			}
		}
		out = append(out, w)
	}
	return out, nil
}

// ListRoutes returns the main table.
func (c Config) ListRoutes() (out []*typespb.Route, err error) {
	err = withLinks(func(nl *conn, ls []link) error {
		out, err = nl.listRoutes(ls)
		return err
	})
	return out, err
}

// AddNeighbors adds entries to the neighbour tables, replacing what they had.
func (c Config) AddNeighbors(want []*typespb.ARPNeighbor) error {
	return withLinks(func(nl *conn, ls []link) error {
		for i, w := range want {
			msg, err := neighMsg(w, ls)
			if err != nil {
				return fmt.Errorf("neighbour %d: %w", i, err)
			}
			if _, err := nl.do(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, msg); err != nil {
				return fmt.Errorf("neighbour %d, %s: %w", i, w.GetToIPAddress().GetAddress(), err)
			}
		}
		return nil
	})
}

// neighMsg is a struct ndmsg with its attributes.
func neighMsg(w *typespb.ARPNeighbor, ls []link) ([]byte, error) {
	ip, err := netip.ParseAddr(w.GetToIPAddress().GetAddress())
	if err != nil {
		return nil, fault.New(fault.InvalidArgument, "toIPAddress: %w", err)
	}
	mac, err := net.ParseMAC(w.Lladdr)
	if err != nil {
		return nil, fault.New(fault.InvalidArgument, "lladdr: %w", err)
	}
	l, err := byName(ls, w.Device)
	if err != nil {
		return nil, err
	}
	fam := byte(unix.AF_INET)
	if ip.Is6() {
		fam = unix.AF_INET6
	}
	state := uint16(w.State)
	if state == 0 {
		state = unix.NUD_PERMANENT
	}
	b := []byte{fam, 0, 0, 0}
	b = native.AppendUint32(b, uint32(l.index))
	b = native.AppendUint16(b, state)
	b = append(b, byte(w.Flags), 0)
	b = attr(b, unix.NDA_DST, ip.AsSlice())
	return attr(b, unix.NDA_LLADDR, mac), nil
}
