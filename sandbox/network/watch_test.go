// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/protocols/typespb"
)

// machine is a VM that takes devices, and its guest.
type machine struct {
	hypervisor.VM // nil: nothing else of it is used
	*guest
}

func (m machine) Err() error { return nil }

// guest is a machine's devices and an agent that only remembers.
type guest struct {
	mu      sync.Mutex
	changed chan struct{}                 // closed and made anew at every change
	nics    map[string]hypervisor.NIC     // guarded by mu; by ID
	ifaces  map[string]*typespb.Interface // guarded by mu; by name
	routes  []*typespb.Route              // guarded by mu
	calls   int                           // guarded by mu
	refuse  error                         // guarded by mu; what PlugNIC answers
}

func newGuest(t *testing.T) *guest {
	g := &guest{changed: make(chan struct{}), nics: map[string]hypervisor.NIC{}, ifaces: map[string]*typespb.Interface{}}
	t.Cleanup(func() {
		for _, n := range g.nics {
			n.Close()
		}
	})
	return g
}

// change is f, seen by await.
func (g *guest) change(f func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f()
	g.calls++
	close(g.changed)
	g.changed = make(chan struct{})
}

func (g *guest) PlugNIC(_ context.Context, n hypervisor.NIC) (place string, err error) {
	g.change(func() {
		if err = g.refuse; err != nil {
			n.Close()
			return
		}
		g.nics[n.ID] = n
		place = fmt.Sprintf("%02x/00", len(g.nics))
	})
	return place, err
}

func (g *guest) UnplugNIC(_ context.Context, id string) error {
	g.change(func() { g.nics[id].Close(); delete(g.nics, id) })
	return nil
}

func (g *guest) UpdateInterface(_ context.Context, r *agentpb.UpdateInterfaceRequest) (*typespb.Interface, error) {
	g.change(func() { g.ifaces[r.Interface.Name] = r.Interface })
	return r.Interface, nil
}

func (g *guest) UpdateRoutes(_ context.Context, r *agentpb.UpdateRoutesRequest) (*agentpb.Routes, error) {
	g.change(func() { g.routes = r.Routes.Routes })
	return r.Routes, nil
}

func (g *guest) AddARPNeighbors(context.Context, *agentpb.AddARPNeighborsRequest) (*emptypb.Empty, error) {
	g.change(func() {})
	return &emptypb.Empty{}, nil
}

func (g *guest) Err(err error) error { return err }

// await waits until the guest is as it should be.
func (g *guest) await(t *testing.T, what string, is func() bool) {
	t.Helper()
	limit := time.After(10 * time.Second)
	for {
		g.mu.Lock()
		ok, next := is(), g.changed
		g.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-next:
		case <-limit:
			t.Fatalf("%s: the guest has %v, routes %v, devices %v", what, g.ifaces, g.routes, g.nics)
		}
	}
}

func (g *guest) hasRoute(dest, gateway, device string) func() bool {
	return func() bool {
		return slices.ContainsFunc(g.routes, func(r *typespb.Route) bool { return r.Dest == dest && r.Gateway == gateway && r.Device == device })
	}
}

// watch runs Watch until the test ends.
func watch(t *testing.T, n *Network, g *guest) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); n.Watch(ctx, machine{guest: g}, g) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			t.Error("Watch does not end")
		}
	})
	t.Cleanup(stop)
	return stop
}

// TestWatch: what happens in a namespace while its machine runs.
func TestWatch(t *testing.T) {
	p := newPlace(t)
	p.veth("eth0", "10.0.0.2/24")
	before := p.state()
	n := p.open()
	nics, err := n.NICs()
	if err != nil {
		t.Fatal(err)
	}
	g := newGuest(t)
	g.nics[nics[0].ID] = nics[0]
	for _, c := range []struct{ place, want string }{{"08/00", "08/00"}, {"10", ""}} { // one that is being plugged in is waited for
		n.plan.Endpoints[0].Guest.DevicePath = ""
		if err := n.Configure(t.Context(), []string{c.place}, g); err != nil {
			t.Fatal(err)
		}
		if got := g.ifaces["eth0"].DevicePath; got != c.want {
			t.Errorf("a device at %s is looked for at %q; want %q", c.place, got, c.want)
		}
	}
	stop := watch(t, n, g)
	p.veth("net1", "10.1.0.2/24")
	p.ip("route", "add", "192.0.2.0/24", "via", "10.1.0.1")
	g.await(t, "a new device", func() bool {
		i := g.ifaces["net1"]
		return i != nil && len(i.IPAddresses) == 1 && i.DevicePath == "02/00" && len(g.nics) == 2
	})
	g.await(t, "its route", g.hasRoute("192.0.2.0/24", "10.1.0.1", "net1"))
	p.ip("addr", "add", "10.0.0.3/24", "dev", "eth0")
	g.await(t, "a new address", func() bool { return len(g.ifaces["eth0"].IPAddresses) == 2 })
	p.ip("link", "set", "eth0", "mtu", "1300")
	g.await(t, "another MTU", func() bool { return g.ifaces["eth0"].Mtu == 1300 })
	p.ip("route", "del", "192.0.2.0/24")
	g.await(t, "a route less", func() bool { return len(g.routes) == 0 })
	p.ip("route", "add", "default", "via", "10.0.0.1")
	g.await(t, "a default route", g.hasRoute("", "10.0.0.1", "eth0"))
	p.ip("link", "del", "net1")
	g.await(t, "a device less", func() bool { return len(g.nics) == 1 })
	// Up to date: nothing to say.
	calls := func() int { g.mu.Lock(); defer g.mu.Unlock(); return g.calls }
	if err := n.Sync(t.Context(), machine{guest: g}, g); err != nil {
		t.Error(err)
	}
	was := calls()
	if err := n.Sync(t.Context(), machine{guest: g}, g); err != nil || calls() != was {
		t.Errorf("a second Sync: %v, %d calls of the guest", err, calls()-was)
	}
	stop()
	p.ip("addr", "del", "10.0.0.3/24", "dev", "eth0")
	p.ip("route", "del", "default")
	p.ip("link", "set", "eth0", "mtu", "1500")
	p.closed(n, before)
}

// TestLateNamespace: the namespace is the VMM's, and nothing of it is in the ledger.
func TestLateNamespace(t *testing.T) {
	p := newPlace(t)
	n, err := Open(t.Context(), "", p.options())
	if err != nil {
		t.Fatal(err)
	}
	g := newGuest(t)
	if err := n.Sync(t.Context(), machine{guest: g}, g); err != nil {
		t.Fatal(err)
	}
	if err := n.Follow(p.path()); err != nil {
		t.Fatal(err)
	}
	watch(t, n, g)
	p.veth("eth0", "10.0.0.2/24")
	g.await(t, "the device", func() bool { return g.ifaces["eth0"] != nil && len(g.ifaces["eth0"].IPAddresses) == 1 })
	if e := p.ledger.Entries(); len(e) > 0 {
		t.Errorf("in the ledger: %v", e)
	}
}

// TestPlugRefused: a device that cannot be plugged in leaves nothing and is not
// tried again until it changes.
func TestPlugRefused(t *testing.T) {
	p := newPlace(t)
	n := p.open()
	g := newGuest(t)
	g.refuse = errors.New("all ports are in use")
	p.veth("eth0", "10.0.0.2/24")
	before := p.state()
	if err := n.Sync(t.Context(), machine{guest: g}, g); !errors.Is(err, g.refuse) {
		t.Fatalf("got %v", err)
	}
	p.unchanged(before)
	if err := n.Sync(t.Context(), machine{guest: g}, g); err != nil {
		t.Errorf("tried again: %v", err)
	}
	g.refuse = nil
	p.ip("addr", "add", "10.0.0.3/24", "dev", "eth0")
	if err := n.Sync(t.Context(), machine{guest: g}, g); err != nil || len(g.ifaces["eth0"].GetIPAddresses()) != 2 {
		t.Errorf("after a change: %v, %v", err, g.ifaces)
	}
}

// TestMove: a restored guest gets the new addresses for the devices in their places,
// and what is compared with a later checkpoint stays as it is.
func TestMove(t *testing.T) {
	p := newPlace(t)
	p.veth("eth0", "10.0.0.2/24")
	n := p.open()
	g := newGuest(t)
	if err := n.Move(t.Context(), []string{"10"}, g); err != nil {
		t.Fatal(err)
	}
	told := g.ifaces["eth0"]
	all, _, err := n.Guest(t.Context())
	if err != nil || told.GetDevicePath() != "10" || told.HwAddr != all[0].HwAddr || all[0].DevicePath != "" {
		t.Errorf("the guest was told %v, the plan is %v, %v", told, all, err)
	}
}
