// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/kata-v2/kata/hypervisor"
)

// unplugTimeout bounds the wait for a guest to let go of a device.
const unplugTimeout = 10 * time.Second

// watchedGroups are the rtnetlink groups whose news may change the plan (rtnetlink(7)).
var watchedGroups = []int{
	unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
}

// Watch follows the namespace until ctx is done: devices that appear are plugged
// into the machine, those that go are unplugged, and the guest is told of changed
// addresses and routes. It waits in one read of a netlink socket.
func (n *Network) Watch(ctx context.Context, vm hypervisor.VM, agent Agent) {
	f, err := n.news()
	if err != nil {
		n.o.Log.Error("watch the network namespace", "error", err)
	}
	if f == nil {
		return
	}
	defer f.Close()
	defer context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })()
	buf := make([]byte, 32<<10)
	for ctx.Err() == nil {
		// First, since something may have changed before the subscription. What the
		// messages say does not matter, only that there are some; so neither does an
		// overrun (ENOBUFS).
		if err := n.Sync(ctx, vm, agent); err != nil && ctx.Err() == nil {
			n.o.Log.Error("follow the network namespace", "error", err)
		}
		if _, err := f.Read(buf); err != nil && !errors.Is(err, unix.ENOBUFS) && ctx.Err() == nil {
			n.o.Log.Error("watch the network namespace", "error", err)
			return
		}
	}
}

// news is the namespace's, nil where there is nothing to follow any more.
func (n *Network) news() (*os.File, error) {
	n.turn <- struct{}{} // nobody else has begun to use it, but maybe to close it
	defer func() { <-n.turn }()
	if n.ns == nil {
		return nil, nil
	}
	return n.ns.subscribe()
}

// subscribe opens a netlink socket in the namespace that reads as long as something changes.
func (n *namespace) subscribe() (f *os.File, err error) {
	err = n.do(func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		f = os.NewFile(uintptr(fd), "rtnetlink")
		var groups uint32
		for _, g := range watchedGroups {
			groups |= 1 << (g - 1)
		}
		return unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups})
	})
	if err != nil && f != nil {
		f.Close()
	}
	return f, err
}

// Sync brings machine and guest up to date with the namespace. What could not be
// connected is tried again when it has changed.
func (n *Network) Sync(ctx context.Context, vm hypervisor.VM, agent Agent) error {
	select {
	case n.turn <- struct{}{}:
		defer func() { <-n.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if n.ns == nil { // nothing to follow, or closed
		return nil
	}
	s, err := scan(n.ns.nl)
	if err != nil {
		return err
	}
	have := map[int]Method{}
	for _, e := range n.endpoints {
		have[e.Link.Index] = e.Method
	}
	s.Links = slices.DeleteFunc(s.Links, func(l Link) bool { return n.skip(l) })
	plan, err := planNetwork(s, n.o.Model, have)
	if err != nil {
		return err
	}
	return n.reconcile(ctx, plan, vm, agent)
}

// skip tells whether a device is our own, or one that could not be connected and
// has not changed since.
func (n *Network) skip(l Link) bool {
	old, failed := n.failed[l.Index]
	if failed && !reflect.DeepEqual(old, l) {
		delete(n.failed, l.Index)
		failed = false
	}
	return failed || strings.HasPrefix(l.Name, tapPrefix) ||
		slices.ContainsFunc(n.endpoints, func(e *endpoint) bool { return e.tap == l.Index })
}

func (n *Network) reconcile(ctx context.Context, plan Plan, vm hypervisor.VM, agent Agent) error {
	changed, errs := false, []error(nil)
	for _, e := range slices.Clone(n.endpoints) {
		if !slices.ContainsFunc(plan.Endpoints, func(p Endpoint) bool { return p.Link.Index == e.Link.Index }) {
			errs = append(errs, n.remove(ctx, e, vm))
			changed = true
		}
	}
	kept := plan.Endpoints[:0:0]
	for _, p := range plan.Endpoints {
		did, err := n.bring(ctx, p, vm, agent)
		if err != nil {
			errs = append(errs, err)
		} else {
			kept = append(kept, p)
		}
		changed = changed || did
	}
	plan.Endpoints = kept
	if changed || !equalLists(plan.Routes, n.plan.Routes) || !equalLists(plan.Neighbours, n.plan.Neighbours) {
		old := n.plan
		n.plan = plan
		if err := n.configureRoutes(ctx, agent); err != nil {
			n.plan = old
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func equalLists[M proto.Message](a, b []M) bool {
	return slices.EqualFunc(a, b, func(x, y M) bool { return proto.Equal(x, y) })
}

// bring makes one device of the guest what the plan says; did tells whether something changed.
func (n *Network) bring(ctx context.Context, p Endpoint, vm hypervisor.VM, agent Agent) (did bool, err error) {
	i := slices.IndexFunc(n.endpoints, func(e *endpoint) bool { return e.Link.Index == p.Link.Index })
	if i < 0 {
		if err := n.plug(ctx, p, vm, agent); err != nil {
			n.failed[p.Link.Index] = p.Link
			return true, fmt.Errorf("network device %s appeared and cannot be connected: %w", p.Link.Name, err)
		}
		return true, nil
	}
	e := n.endpoints[i]
	p.Guest.DevicePath = e.Guest.DevicePath
	if proto.Equal(p.Guest, e.Guest) {
		return false, nil
	}
	if p.Link.MTU != e.Link.MTU {
		if err := e.setMTU(p.Link.MTU); err != nil {
			return false, err
		}
	}
	if err := configureInterface(ctx, p.Guest, agent); err != nil {
		return false, err
	}
	n.o.Log.Info("network device changed", "device", p.Link.Name, "addresses", len(p.Guest.IPAddresses), "mtu", p.Link.MTU)
	e.Endpoint = p
	return true, nil
}

// plug connects a device that appeared after the machine had started.
func (n *Network) plug(ctx context.Context, p Endpoint, vm hypervisor.VM, agent Agent) (err error) {
	plugger, ok := vm.(hypervisor.NICPlugger)
	if !ok {
		return errors.New("the hypervisor plugs no network devices into a running machine")
	}
	begin := time.Now()
	e, err := n.attach(p)
	if err != nil {
		return err
	}
	nic, err := e.nic()
	if err != nil {
		return e.abandon(err)
	}
	if e.Guest.DevicePath, err = plugger.PlugNIC(ctx, nic); err != nil {
		return e.abandon(err)
	}
	n.endpoints = append(n.endpoints, e)
	plugged := time.Now()
	if err := configureInterface(ctx, e.Guest, agent); err != nil {
		return errors.Join(err, n.remove(ctx, e, vm))
	}
	n.o.Log.Info("network device plugged in", "device", p.Link.Name, "place", e.Guest.DevicePath,
		"t_plug", plugged.Sub(begin), "t_guest", time.Since(plugged))
	return nil
}

// remove disconnects a device that is gone.
func (n *Network) remove(ctx context.Context, e *endpoint, vm hypervisor.VM) error {
	n.endpoints = slices.DeleteFunc(n.endpoints, func(o *endpoint) bool { return o == e })
	var errs []error
	if plugger, ok := vm.(hypervisor.NICPlugger); ok {
		ctx, cancel := context.WithTimeout(ctx, unplugTimeout)
		defer cancel()
		errs = append(errs, plugger.UnplugNIC(ctx, e.id()))
	}
	if err := e.undo.run(); err != nil {
		errs = append(errs, fmt.Errorf("disconnect network device %s: %w", e.Link.Name, err))
		n.orphans = append(n.orphans, e)
	}
	n.o.Log.Info("network device is gone", "device", e.Link.Name)
	return errors.Join(errs...)
}
