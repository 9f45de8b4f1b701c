// SPDX-License-Identifier: Apache-2.0

package network

import (
	"encoding/json"
	"flag"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/protocols/typespb"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func mac(last byte) net.HardwareAddr { return net.HardwareAddr{2, 0, 0, 0, 0, last} }

func addr(s string) Addr { return Addr{Prefix: netip.MustParsePrefix(s)} }

// kernelAddr is a link-local address of the kernel's.
func kernelAddr(l Link) Addr {
	return Addr{Prefix: netip.PrefixFrom(eui64(l.MAC), 64), Kernel: true}
}

// veth is an Ethernet device that is up, with its link-local address.
func veth(index int, name string, addrs ...Addr) Link {
	l := Link{Index: index, Name: name, Kind: "veth", MAC: mac(byte(index)), MTU: 1500, Ethernet: true, Up: true, Running: true, Addrs: addrs}
	l.Addrs = append(l.Addrs, kernelAddr(l))
	return l
}

func with(l Link, change func(*Link)) Link { change(&l); return l }

// kernelRoute is the route that the kernel makes for an address.
func kernelRoute(link int, dest, src string) Route {
	return Route{Link: link, Dest: netip.MustParsePrefix(dest), Source: optional(src), Scope: unix.RT_SCOPE_LINK, Kernel: true}
}

func via(link int, dest, gateway string) Route {
	return Route{Link: link, Dest: netip.MustParsePrefix(dest), Gateway: optional(gateway)}
}

func optional(s string) netip.Addr {
	if s == "" {
		return netip.Addr{}
	}
	return netip.MustParseAddr(s)
}

func metric(r Route, n int) Route { r.Priority = n; return r }

func linkLocalRoutes(link int) []Route {
	return []Route{{Link: link, Dest: netip.MustParsePrefix("fe80::/64"), Kernel: true, Priority: 256},
		{Link: link, Dest: netip.MustParsePrefix("ff00::/8"), Kernel: true, Priority: 256}}
}

func TestPlan(t *testing.T) {
	eth0 := veth(2, "eth0", addr("10.0.0.2/24"), addr("2001:db8::2/64"))
	net1 := veth(3, "net1", addr("10.1.0.2/24"))
	for name, c := range map[string]struct {
		s     State
		model Model
		have  map[int]Method
	}{
		"dual-stack": {s: State{Links: []Link{eth0}, Routes: append([]Route{
			via(2, "0.0.0.0/0", "10.0.0.1"), kernelRoute(2, "10.0.0.0/24", "10.0.0.2"), via(2, "192.0.2.0/24", "10.0.0.254"),
			kernelRoute(2, "2001:db8::/64", ""), via(2, "::/0", "fe80::1"),
		}, linkLocalRoutes(2)...), Neighbours: []Neighbour{
			{Link: 2, IP: optional("10.0.0.1"), MAC: mac(99), State: unix.NUD_PERMANENT},
			{Link: 2, IP: optional("2001:db8::1"), MAC: mac(98), State: unix.NUD_PERMANENT},
			{Link: 2, IP: optional("ff02::1"), MAC: mac(97), State: unix.NUD_PERMANENT},
			{Link: 9, IP: optional("10.9.0.1"), MAC: mac(96), State: unix.NUD_PERMANENT},
		}}},
		// A gateway that is in no network of the device: first the way to it.
		"point-to-point": {s: State{Links: []Link{veth(2, "eth0", addr("10.0.0.7/32"))}, Routes: []Route{
			via(2, "0.0.0.0/0", "169.254.1.1"), {Link: 2, Dest: netip.MustParsePrefix("169.254.1.1/32"), Scope: unix.RT_SCOPE_LINK},
			{Link: 2, Dest: netip.MustParsePrefix("10.9.0.0/16"), Gateway: optional("169.254.9.9"), OnLink: true, MTU: 1400},
		}}},
		"peer-address": {s: State{Links: []Link{veth(2, "eth0", addr("10.0.0.7/32"))}, Routes: []Route{
			kernelRoute(2, "10.0.0.1/32", "10.0.0.7"), via(2, "0.0.0.0/0", "10.0.0.1"),
		}}},
		// The same destination over two devices: the lower metric stays.
		"several-devices": {s: State{Links: []Link{eth0, net1, with(veth(4, "down0"), func(l *Link) { l.Up = false }),
			with(veth(5, "port0"), func(l *Link) { l.Master = 6 })}, Routes: []Route{
			metric(via(3, "0.0.0.0/0", "10.1.0.1"), 200), metric(via(2, "0.0.0.0/0", "10.0.0.1"), 100),
			kernelRoute(2, "10.0.0.0/24", "10.0.0.2"), kernelRoute(3, "10.1.0.0/24", "10.1.0.2"),
		}}},
		"privacy-address": {s: State{Links: []Link{veth(2, "eth0", addr("2001:db8::2/64"),
			Addr{Prefix: netip.MustParsePrefix("2001:db8::aaaa/64"), Temporary: true}, addr("fe80::1/64"))}}},
		"taps": {s: State{Links: []Link{
			with(veth(2, "tap0", addr("10.0.0.2/24")), func(l *Link) { l.Kind, l.Running = "tuntap", false }),
			with(veth(3, "tap1"), func(l *Link) { l.Kind = "tuntap" }),
			{Index: 4, Name: "sit0", Kind: "sit", Up: true},
		}}},
		"kinds":     {s: State{Links: []Link{with(eth0, func(l *Link) { l.Kind = "macvlan" }), with(net1, func(l *Link) { l.Kind, l.NoARP = "ipvlan", true })}}},
		"macvtap":   {s: State{Links: []Link{eth0}}, model: Macvtap},
		"none":      {s: State{Links: []Link{eth0}}, model: None},
		"connected": {s: State{Links: []Link{with(eth0, func(l *Link) { l.Up = false })}}, have: map[int]Method{2: MethodRedirect}},
		"empty":     {},
	} {
		t.Run(name, func(t *testing.T) {
			model := c.model
			if model == "" {
				model = TCFilter
			}
			p, err := planNetwork(c.s, model, c.have)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name, p)
		})
	}
}

// golden compares a plan, without what it was made from, with a file.
func golden(t *testing.T, name string, p Plan) {
	t.Helper()
	type endpoint struct {
		Method Method
		Guest  *typespb.Interface
	}
	out := struct {
		Endpoints  []endpoint
		Routes     []*typespb.Route
		Neighbours []*typespb.ARPNeighbor
		Left       []string
	}{Routes: p.Routes, Neighbours: p.Neighbours, Left: p.Left}
	for _, e := range p.Endpoints {
		out.Endpoints = append(out.Endpoints, endpoint{e.Method, e.Guest})
	}
	got, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	path := filepath.Join("testdata", name+".json")
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("the plan differs from %s (go test -update rewrites it):\n%s", path, got)
	}
}

func TestPlanRefuses(t *testing.T) {
	eth0, net1 := veth(2, "eth0", addr("10.0.0.2/24")), veth(3, "net1", addr("10.0.0.3/24"))
	odd := via(2, "0.0.0.0/0", "")
	odd.Link, odd.Unsupported = 0, "several next hops"
	for name, c := range map[string]struct {
		s     State
		model Model
		kind  func(error) bool
		words []string
	}{
		"mtu": {State{Links: []Link{with(eth0, func(l *Link) { l.MTU = 65535 })}}, TCFilter, errdefs.IsInvalidArgument, []string{"eth0", "65535", "65521"}},
		"overlap": {State{Links: []Link{eth0, net1}, Routes: []Route{kernelRoute(2, "10.0.0.0/24", ""), kernelRoute(3, "10.0.0.0/24", "")}},
			TCFilter, errdefs.IsInvalidArgument, []string{"overlapping", "10.0.0.0/24", "eth0", "net1"}},
		"tun": {State{Links: []Link{{Index: 4, Name: "tun0", Kind: "tuntap", Up: true, Addrs: []Addr{addr("10.0.0.1/24")}}}},
			TCFilter, errdefs.IsNotImplemented, []string{"tun0", "Ethernet"}},
		"multipath":          {State{Links: []Link{eth0}, Routes: []Route{odd}}, TCFilter, errdefs.IsNotImplemented, []string{"0.0.0.0/0", "next hops"}},
		"macvtap on macvlan": {State{Links: []Link{with(eth0, func(l *Link) { l.Kind = "macvlan" })}}, Macvtap, errdefs.IsInvalidArgument, []string{"eth0", "macvlan", "tcfilter"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := planNetwork(c.s, c.model, nil)
			if err == nil || !c.kind(err) {
				t.Fatalf("got %v", err)
			}
			for _, w := range c.words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("the error does not name %q: %v", w, err)
				}
			}
		})
	}
}
