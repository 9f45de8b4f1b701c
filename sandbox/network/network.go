// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/protocols/typespb"
	"github.com/kata-v2/kata/sandbox/ledger"
)

// Options describe a pod's network.
type Options struct {
	// Model is how devices are connected.
	Model Model
	// Queues is the number of queue pairs of each device, at least 1.
	Queues int
	// NoVhost keeps the VMM from using the kernel's vhost-net.
	NoVhost bool
	// RxRate and TxRate limit what each device receives and sends, in bits per
	// second; 0 is no limit. For the model TCFilter only.
	RxRate, TxRate uint64
	// Required refuses a namespace without any device: the caller says that a
	// network was set up in it.
	Required bool
	// Ledger remembers what outlives a killed shim.
	Ledger Ledger
	// Log gets one line per event.
	Log *slog.Logger
}

// Ledger is the part of ledger.Ledger that is used here.
type Ledger interface {
	Record(ledger.Entry) (ledger.Token, error)
	Forget(ledger.Token) error
}

// Agent is the part of the guest's agent that configures its network.
type Agent interface {
	UpdateInterface(context.Context, *agentpb.UpdateInterfaceRequest) (*typespb.Interface, error)
	UpdateRoutes(context.Context, *agentpb.UpdateRoutesRequest) (*agentpb.Routes, error)
	AddARPNeighbors(context.Context, *agentpb.AddARPNeighborsRequest) (*emptypb.Empty, error)
	// Err makes an error of the other methods meaningful.
	Err(error) error
}

// Network is a pod's network.
type Network struct {
	o Options

	// turn is held, as its one element, by whoever uses what follows.
	turn chan struct{}
	ns   *namespace // nil for the model None and before Follow
	// ledgerNS is the path by which a reaper finds the namespace; empty when it
	// ends with the VMM, and everything in it too.
	ledgerNS  string
	plan      Plan // what the guest was told last
	endpoints []*endpoint
	orphans   []*endpoint  // disconnected, and not undone in full
	failed    map[int]Link // devices that could not be connected, as they were then
}

// Open scans the namespace bound at path and connects its devices. An empty path
// means a namespace that the VMM makes; see Follow. On error nothing is left. The
// error names the device or route, and is InvalidArgument, FailedPrecondition or
// NotImplemented for what the namespace's maker can change.
func Open(ctx context.Context, path string, o Options) (*Network, error) {
	n := &Network{o: o, ledgerNS: path, turn: make(chan struct{}, 1), failed: map[int]Link{}}
	if path == "" || o.Model == None {
		return n, nil
	}
	ns, err := openNamespace(path)
	if err != nil {
		return nil, err
	}
	n.ns = ns
	if err := n.connect(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("network namespace %s: %w", path, err), n.Close())
	}
	return n, nil
}

func (n *Network) connect(ctx context.Context) error {
	s, err := scan(n.ns.nl)
	if err != nil {
		return err
	}
	if n.plan, err = planNetwork(s, n.o.Model, nil); err != nil {
		return err
	}
	if n.o.Required && len(n.plan.Endpoints) == 0 {
		return fmt.Errorf("it has no network device that is up beside loopback; was the pod's network set up? "+
			"(a pod without network needs internetworking_model = %q): %w", None, errdefs.ErrFailedPrecondition)
	}
	for _, p := range n.plan.Endpoints {
		if err := ctx.Err(); err != nil {
			return err
		}
		e, err := n.attach(p)
		if err != nil {
			return err
		}
		n.endpoints = append(n.endpoints, e)
	}
	for _, why := range n.plan.Left {
		n.o.Log.Info("network device not connected", "reason", why)
	}
	return nil
}

// NICs are the devices for the machine's configuration, which owns their files
// from then on. It is called once.
func (n *Network) NICs() ([]hypervisor.NIC, error) {
	var out []hypervisor.NIC
	for _, e := range n.endpoints {
		nic, err := e.nic()
		if err != nil {
			for _, o := range out {
				o.Close()
			}
			return nil, fmt.Errorf("network device %s: %w", e.Link.Name, err)
		}
		out = append(out, nic)
	}
	return out, nil
}

// Guest is what the guest was told: its devices, in the order of NICs, and routes.
func (n *Network) Guest(ctx context.Context) ([]*typespb.Interface, []*typespb.Route, error) {
	select {
	case n.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	defer func() { <-n.turn }()
	var out []*typespb.Interface
	for _, e := range n.plan.Endpoints {
		out = append(out, e.Guest)
	}
	return out, n.plan.Routes, nil
}

// Follow names the namespace of a network that was opened without one: that of
// the running VMM.
func (n *Network) Follow(path string) (err error) {
	if n.ns == nil && n.o.Model != None {
		n.ns, err = openNamespace(path)
	}
	return err
}

// Configure gives the guest's devices their names, addresses, routes and
// neighbours. places are where the guest finds the machine's NICs.
func (n *Network) Configure(ctx context.Context, places []string, agent Agent) error {
	for i, e := range n.plan.Endpoints {
		// The hardware address tells devices apart, except those that share one, as ipvlan's do.
		same := func(o Endpoint) bool { return o.Guest.HwAddr == e.Guest.HwAddr && o.Guest.Name != e.Guest.Name }
		// One that is being plugged in, which is below another slot, is waited for by its place.
		if i < len(places) && (slices.ContainsFunc(n.plan.Endpoints, same) || strings.Contains(places[i], "/")) {
			e.Guest.DevicePath = places[i]
		}
		if err := configureInterface(ctx, e.Guest, agent); err != nil {
			return err
		}
	}
	if len(n.plan.Endpoints) > 0 {
		return n.configureRoutes(ctx, agent)
	}
	return nil
}

// Move is Configure for a restored guest, whose devices have the addresses of the
// pod that was saved and are known by their places.
func (n *Network) Move(ctx context.Context, places []string, agent Agent) error {
	for i, e := range n.plan.Endpoints {
		moved := proto.Clone(e.Guest).(*typespb.Interface)
		if i < len(places) {
			moved.DevicePath = places[i]
		}
		if err := configureInterface(ctx, moved, agent); err != nil {
			return err
		}
	}
	if len(n.plan.Endpoints) > 0 {
		return n.configureRoutes(ctx, agent)
	}
	return nil
}

func configureInterface(ctx context.Context, i *typespb.Interface, agent Agent) error {
	if _, err := agent.UpdateInterface(ctx, &agentpb.UpdateInterfaceRequest{Interface: i}); err != nil {
		return fmt.Errorf("network device %s in the guest: %w", i.Name, agent.Err(err))
	}
	return nil
}

func (n *Network) configureRoutes(ctx context.Context, agent Agent) error {
	if _, err := agent.UpdateRoutes(ctx, &agentpb.UpdateRoutesRequest{Routes: &agentpb.Routes{Routes: n.plan.Routes}}); err != nil {
		return fmt.Errorf("routes in the guest: %w", agent.Err(err))
	}
	if len(n.plan.Neighbours) == 0 {
		return nil
	}
	req := &agentpb.AddARPNeighborsRequest{Neighbors: &agentpb.ARPNeighbors{ARPNeighbors: n.plan.Neighbours}}
	if _, err := agent.AddARPNeighbors(ctx, req); err != nil {
		return fmt.Errorf("neighbours in the guest: %w", agent.Err(err))
	}
	return nil
}

// Close disconnects everything. The machine has ended, is about to, or knows nothing
// of it. Calling it again is harmless.
func (n *Network) Close() error {
	n.turn <- struct{}{} // a Sync ends with the machine
	defer func() { <-n.turn }()
	var errs []error
	for _, e := range slices.Backward(append(n.orphans, n.endpoints...)) {
		closeFiles(e.taps)
		e.taps = nil
		if err := e.undo.run(); err != nil {
			errs = append(errs, fmt.Errorf("disconnect network device %s: %w", e.Link.Name, err))
		}
	}
	n.endpoints, n.orphans = nil, nil
	if n.ns != nil {
		n.ns.close()
		n.ns = nil
	}
	return errors.Join(errs...)
}

// acquire writes an entry down, then does what it is for; release undoes both.
// What lies in a namespace that ends with the VMM needs no entry.
func (n *Network) acquire(u *undoList, entry ledger.Entry, do, release func() error) error {
	forget := func() error { return nil }
	if n.ledgerNS != "" {
		t, err := n.o.Ledger.Record(entry)
		if err != nil {
			return err
		}
		forget = func() error { return n.o.Ledger.Forget(t) }
	}
	if err := do(); err != nil {
		return errors.Join(err, forget())
	}
	u.push(func() error {
		if err := release(); err != nil {
			return fmt.Errorf("%s: %w", entry, err)
		}
		return forget()
	})
	return nil
}
