// SPDX-License-Identifier: Apache-2.0

package network

import (
	"errors"
	"fmt"
	"math"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/sandbox/ledger"
)

// rateHandle is the handle of our root qdisc on a device of somebody else's.
var rateHandle = netlink.MakeHandle(0x6b61, 0)

// Bounds of a token bucket: what may be sent at once and how long a packet may
// wait. A tap's packets have up to 64 KiB.
const (
	leastBurst   = 128 << 10 // bytes
	burstSeconds = 0.02
	queueSeconds = 0.05
)

// tokenBucket limits what a device sends to bits per second (tc-tbf(8)).
func tokenBucket(index int, bits uint64) *netlink.Tbf {
	rate := max(bits/8, 1)
	burst := math.Max(leastBurst, burstSeconds*float64(rate))
	micros := math.Min(burst/float64(rate)*1e6, math.MaxUint32/netlink.TickInUsec())
	return &netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Parent: netlink.HANDLE_ROOT, Handle: rateHandle},
		Rate:       rate,
		Buffer:     uint32(micros * netlink.TickInUsec()),
		Limit:      uint32(math.Min(burst+queueSeconds*float64(rate), math.MaxUint32)),
	}
}

// limitRates shapes what leaves the tap, which the guest receives, and what
// leaves the device, which it sends.
func (e *endpoint) limitRates(tap, device netlink.Link) error {
	n := e.net
	if rx := n.o.RxRate; rx > 0 {
		if err := n.ns.nl.QdiscAdd(tokenBucket(tap.Attrs().Index, rx)); err != nil {
			return fmt.Errorf("rx_rate_limiter_max_rate %d of %s: %w", rx, e.Link.Name, err)
		}
	}
	tx := n.o.TxRate
	if tx == 0 {
		return nil
	}
	q := tokenBucket(device.Attrs().Index, tx)
	add := func() error {
		err := addQdisc(n.ns.nl, device, q)
		if errors.Is(err, unix.EEXIST) {
			err = fmt.Errorf("the device has a root qdisc already: %w: %w", err, errdefs.ErrFailedPrecondition)
		}
		if err != nil {
			return fmt.Errorf("tx_rate_limiter_max_rate %d of %s: %w", tx, e.Link.Name, err)
		}
		return nil
	}
	return n.acquire(&e.undo, ledger.Qdisc(n.ledgerNS, e.Link.Name, rateHandle), add, func() error { return gone(n.ns.nl.QdiscDel(q)) })
}
