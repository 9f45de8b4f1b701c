// SPDX-License-Identifier: Apache-2.0

package network

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/protocols/typespb"
)

// planRoutes picks the routes of the connected devices that the guest's kernel
// does not make by itself, in an order in which each can be added: first those
// without a gateway. names maps the indexes of those devices to names.
func planRoutes(s State, names map[int]string) ([]*typespb.Route, error) {
	kept, err := pickRoutes(s, names)
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(kept, func(a, b Route) int { return cmp.Compare(rank(a), rank(b)) })
	var out []*typespb.Route
	for _, r := range kept {
		if !madeByKernel(r, s) {
			out = append(out, wireRoute(r, names[r.Link]))
		}
	}
	return out, nil
}

func rank(r Route) int {
	switch {
	case !r.Gateway.IsValid():
		return 0
	case r.OnLink:
		return 1
	case r.Dest.Bits() > 0:
		return 2
	}
	return 3 // a default gateway may be reached by any other route
}

// pickRoutes keeps of each destination the route with the lowest metric, since
// the protocol has no field for it. Two that the kernel too can only tell apart
// by their order are refused.
func pickRoutes(s State, names map[int]string) ([]Route, error) {
	var kept []Route
	at := map[netip.Prefix]int{}
	for _, r := range s.Routes {
		if r.Unsupported != "" && (r.Link == 0 || names[r.Link] != "") {
			return nil, fmt.Errorf("route to %s has %s, which the guest's protocol cannot express: %w", r.Dest, r.Unsupported, errdefs.ErrNotImplemented)
		}
		// Every device has the link-local network, and the guest's kernel makes it itself.
		if names[r.Link] == "" || r.Kernel && r.Dest.Addr().Is6() && (r.Dest.Addr().IsLinkLocalUnicast() || r.Dest.Addr().IsMulticast()) {
			continue
		}
		i, dup := at[r.Dest]
		switch {
		case !dup:
			at[r.Dest] = len(kept)
			kept = append(kept, r)
		case r.Priority == kept[i].Priority:
			return nil, fmt.Errorf("overlapping routes: %s and %s: give them different metrics: %w",
				describe(kept[i], names), describe(r, names), errdefs.ErrInvalidArgument)
		case r.Priority < kept[i].Priority:
			kept[i] = r
		}
	}
	return kept, nil
}

func describe(r Route, names map[int]string) string {
	s := r.Dest.String()
	if r.Gateway.IsValid() {
		s += " via " + r.Gateway.String()
	}
	return fmt.Sprintf("%s dev %s metric %d", s, names[r.Link], r.Priority)
}

// madeByKernel tells whether the guest's kernel makes the route for an address
// that it is given.
func madeByKernel(r Route, s State) bool {
	if !r.Kernel {
		return false
	}
	for _, l := range s.Links {
		if l.Index == r.Link {
			return slices.ContainsFunc(l.Addrs, func(a Addr) bool { return !a.Temporary && a.Masked() == r.Dest.Masked() })
		}
	}
	return false
}

func wireRoute(r Route, device string) *typespb.Route {
	out := &typespb.Route{Device: device, Family: family(r.Dest.Addr()), Scope: uint32(r.Scope), Mtu: uint32(r.MTU)}
	if r.Dest.Bits() > 0 {
		out.Dest = r.Dest.String()
	}
	if r.Gateway.IsValid() {
		out.Gateway = r.Gateway.String()
	}
	if r.Source.IsValid() {
		out.Source = r.Source.String()
	}
	if r.OnLink {
		out.Flags = unix.RTNH_F_ONLINK
	}
	return out
}
