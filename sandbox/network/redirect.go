// SPDX-License-Identifier: Apache-2.0

package network

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/sandbox/ledger"
)

// redirectPriority is the priority of the filters that redirect. On a device
// whose ingress qdisc is somebody else's, theirs of a lower number go first.
const redirectPriority = 0x6b61

// redirect hands every frame that arrives at from to the device to, as if it had
// been sent there. On a device of ours nothing has to be undone: it ends whole.
func (e *endpoint) redirect(from, to netlink.Link, ours bool) error {
	nl, name := e.net.ns.nl, from.Attrs().Name
	f := &netlink.U32{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: from.Attrs().Index, Parent: netlink.MakeHandle(0xffff, 0), Priority: redirectPriority, Protocol: unix.ETH_P_ALL,
		},
		Actions: []netlink.Action{netlink.NewMirredAction(to.Attrs().Index)},
	}
	add := func() error {
		if err := nl.FilterAdd(f); err != nil {
			return fmt.Errorf("redirect %s to %s: %w", name, to.Attrs().Name, err)
		}
		return nil
	}
	others, err := e.hasIngress(from)
	if err != nil {
		return err
	}
	if others {
		f.Parent = netlink.HANDLE_MIN_INGRESS // of an ingress qdisc as well as of a clsact
		return e.net.acquire(&e.undo, ledger.Filter(e.net.ledgerNS, name, f.Parent, redirectPriority), add, func() error { return gone(nl.FilterDel(f)) })
	}
	q := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: f.LinkIndex, Parent: netlink.HANDLE_INGRESS, Handle: f.Parent}}
	addIngress := func() error {
		if err := addQdisc(nl, from, q); err != nil {
			return fmt.Errorf("ingress qdisc of %s: %w", name, err)
		}
		return nil
	}
	if ours {
		err = addIngress()
	} else {
		err = e.net.acquire(&e.undo, ledger.Ingress(e.net.ledgerNS, name), addIngress, func() error { return gone(nl.QdiscDel(q)) })
	}
	if err != nil {
		return err
	}
	return add()
}

// addQdisc adds a qdisc to a device and keeps its queue length, which the kernel
// sets to its default with any qdisc when it is 0, as CNI plugins make it
// (Linux net/sched/sch_api.c, qdisc_create).
func addQdisc(nl *netlink.Handle, l netlink.Link, q netlink.Qdisc) error {
	if err := nl.QdiscAdd(q); err != nil {
		return err
	}
	if l.Attrs().TxQLen != 0 {
		return nil
	}
	if err := nl.LinkSetTxQLen(l, 0); err != nil {
		return errors.Join(fmt.Errorf("keep the queue length: %w", err), gone(nl.QdiscDel(q)))
	}
	return nil
}

func (e *endpoint) hasIngress(l netlink.Link) (bool, error) {
	qdiscs, err := e.net.ns.nl.QdiscList(l)
	if err != nil {
		return false, fmt.Errorf("qdiscs of %s: %w", l.Attrs().Name, err)
	}
	for _, q := range qdiscs {
		if q.Attrs().Parent == netlink.HANDLE_INGRESS {
			return true, nil
		}
	}
	return false, nil
}

// gone makes the undoing of what does not exist any more a success.
func gone(err error) error {
	for _, e := range []error{unix.ENODEV, unix.ENOENT, unix.EINVAL, unix.ENXIO} {
		if errors.Is(err, e) {
			return nil
		}
	}
	return err
}

// connectTap makes the endpoint's tap, gives it the device's MTU, brings it up and
// redirects both ways.
func (e *endpoint) connectTap() error {
	n := e.net
	name := fmt.Sprintf("%s%d", tapPrefix, e.Link.Index)
	var tap netlink.Link
	make := func() (err error) {
		if e.taps, err = n.ns.openTap(name, n.o.Queues, n.o.Queues > 1, true); err != nil {
			return err
		}
		if tap, err = n.ns.nl.LinkByName(name); err != nil {
			return fmt.Errorf("tap %s: %w", name, err)
		}
		return nil
	}
	if err := n.acquire(&e.undo, ledger.Link(n.ledgerNS, name), make, func() error { return gone(n.ns.nl.LinkDel(tap)) }); err != nil {
		return err
	}
	e.tap = tap.Attrs().Index
	if err := n.ns.nl.LinkSetMTU(tap, e.Link.MTU); err != nil {
		return fmt.Errorf("tap %s refuses the MTU %d of %s: %w: %w", name, e.Link.MTU, e.Link.Name, err, errdefs.ErrInvalidArgument)
	}
	// The tap is a wire: a link-local address of its own would be a stranger in the guest's network.
	const addrGenModeNone = 1 // enum in6_addr_gen_mode, Linux if_link.h
	if err := n.ns.nl.LinkSetIP6AddrGenMode(tap, addrGenModeNone); err != nil {
		n.o.Log.Debug("a tap without IPv6", "device", name, "error", err)
	}
	device, err := n.ns.nl.LinkByIndex(e.Link.Index)
	if err != nil {
		return fmt.Errorf("network device %s: %w", e.Link.Name, err)
	}
	if err := e.limitRates(tap, device); err != nil {
		return err
	}
	if err := e.redirect(tap, device, true); err != nil {
		return err
	}
	if err := e.redirect(device, tap, false); err != nil {
		return err
	}
	if err := n.ns.nl.LinkSetUp(tap); err != nil {
		return fmt.Errorf("bring up tap %s: %w", name, err)
	}
	return nil
}
