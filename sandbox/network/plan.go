// SPDX-License-Identifier: Apache-2.0

package network

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/protocols/typespb"
)

// Model is how a device's frames reach the machine; the values are those of
// internetworking_model.
type Model string

// The models.
const (
	// TCFilter redirects between the device and a tap with traffic control.
	TCFilter Model = "tcfilter"
	// Macvtap puts a macvtap in passthru mode on the device.
	Macvtap Model = "macvtap"
	// None connects nothing; the guest has loopback only.
	None Model = "none"
)

// Method is how one device is connected.
type Method string

// The methods.
const (
	// MethodRedirect is tcfilter's.
	MethodRedirect Method = "redirect"
	// MethodMacvtap is macvtap's.
	MethodMacvtap Method = "macvtap"
	// MethodTap opens the device, a tap that no program holds, and needs nothing beside it.
	MethodTap Method = "tap"
)

// maxTapMTU is the largest MTU of a tap: 65535 bytes less the Ethernet header
// (Linux drivers/net/tun.c, MAX_MTU).
const maxTapMTU = 65535 - 14

// Endpoint is one device of the namespace that the guest gets.
type Endpoint struct {
	Link   Link
	Method Method
	// Guest is the device as the agent is told of it; devicePath is set once the place is known.
	Guest *typespb.Interface
}

// Plan is what the guest gets of a namespace.
type Plan struct {
	Endpoints  []Endpoint
	Routes     []*typespb.Route
	Neighbours []*typespb.ARPNeighbor
	// Left names what stays behind, and why, for the log.
	Left []string
}

// planNetwork decides what the guest gets of a namespace. It is a pure function.
// have tells how devices are connected already, by index: they stay so, up or not.
func planNetwork(s State, model Model, have map[int]Method) (Plan, error) {
	var p Plan
	if model == None {
		return p, nil
	}
	names := map[int]string{}
	for _, l := range s.Links {
		method, connected := have[l.Index]
		if !l.Up && !connected {
			continue
		}
		why := ""
		if !connected {
			var err error
			if method, why, err = methodOf(l, model); err != nil {
				return Plan{}, err
			}
		}
		if why != "" {
			p.Left = append(p.Left, fmt.Sprintf("device %s: %s", l.Name, why))
			continue
		}
		names[l.Index] = l.Name
		p.Endpoints = append(p.Endpoints, Endpoint{Link: l, Method: method, Guest: guestInterface(l, method)})
	}
	var err error
	if p.Routes, err = planRoutes(s, names); err != nil {
		return Plan{}, err
	}
	for _, n := range s.Neighbours {
		if names[n.Link] == "" || len(n.MAC) == 0 || n.IP.IsMulticast() {
			continue
		}
		p.Neighbours = append(p.Neighbours, &typespb.ARPNeighbor{
			ToIPAddress: &typespb.IPAddress{Family: family(n.IP), Address: n.IP.String()},
			Device:      names[n.Link], Lladdr: n.MAC.String(), State: int32(n.State), Flags: int32(n.Flags),
		})
	}
	return p, nil
}

// methodOf decides how a device is connected; why is set for one that is left out.
func methodOf(l Link, model Model) (m Method, why string, err error) {
	unheldTap := l.Kind == "tuntap" && l.Ethernet && !l.Running
	switch {
	case l.Master != 0 && !unheldTap:
		return "", "is a port of another device", nil
	case !l.Ethernet && len(l.Addrs) == 0:
		return "", "has no Ethernet frames and no address", nil
	case !l.Ethernet || len(l.MAC) != 6:
		return "", "", fmt.Errorf("network device %s (%s): it has no Ethernet frames, which a virtual machine's network device needs: %w",
			l.Name, l.Kind, errdefs.ErrNotImplemented)
	case l.MTU > maxTapMTU:
		return "", "", fmt.Errorf("network device %s: MTU %d: a tap refuses more than %d: %w", l.Name, l.MTU, maxTapMTU, errdefs.ErrInvalidArgument)
	case unheldTap:
		return MethodTap, "", nil
	case model == Macvtap && (l.Kind == "ipvlan" || l.Kind == "macvlan"):
		return "", "", fmt.Errorf("network device %s: a macvtap cannot lie on a device of kind %s: use internetworking_model = %q: %w",
			l.Name, l.Kind, TCFilter, errdefs.ErrInvalidArgument)
	case model == Macvtap:
		return MethodMacvtap, "", nil
	}
	return MethodRedirect, "", nil
}

func guestInterface(l Link, m Method) *typespb.Interface {
	out := &typespb.Interface{Device: l.Name, Name: l.Name, Mtu: uint64(l.MTU), HwAddr: guestMAC(l, m).String(), Type: l.Kind}
	if l.NoARP {
		out.RawFlags = unix.IFF_NOARP
	}
	for _, a := range l.Addrs {
		if a.Kernel || a.Temporary {
			continue
		}
		out.IPAddresses = append(out.IPAddresses, &typespb.IPAddress{
			Family: family(a.Addr()), Address: a.Addr().String(), Mask: strconv.Itoa(a.Bits()),
		})
	}
	return out
}

// guestMAC is the device's own, so that neighbours keep what they know. Only the
// other end of a tap must have another one: it is the same bit pattern with the
// last bit turned, locally administered.
func guestMAC(l Link, m Method) net.HardwareAddr {
	if m != MethodTap {
		return l.MAC
	}
	mac := slices.Clone(l.MAC)
	mac[0] |= 2
	mac[5] ^= 1
	return mac
}

func family(ip netip.Addr) typespb.IPFamily {
	if ip.Is6() {
		return typespb.IPFamily_v6
	}
	return typespb.IPFamily_v4
}
