// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/typeurl/v2"
)

func publish(p *publisher, from, to int) {
	for i := from; i < to; i++ {
		p.publish(topicOOM, &events.TaskOOM{ContainerID: fmt.Sprint(i)})
	}
}

func number(t *testing.T, e *types.Envelope) string {
	t.Helper()
	v, err := typeurl.UnmarshalAny(e.Event)
	must(t, err)
	return v.(*events.TaskOOM).ContainerID
}

// expect reads events in their order. One may come twice when containerd went
// down between taking and confirming it.
func expect(t *testing.T, c *containerd, from, to int) {
	t.Helper()
	for i := from; i < to; {
		switch got := number(t, c.next()); got {
		case fmt.Sprint(i):
			i++
		case fmt.Sprint(i - 1):
		default:
			t.Fatalf("event %s; want %d", got, i)
		}
	}
}

// Events keep their order, wait while containerd is down, and arrive afterwards.
func TestPublisherOutlivesContainerd(t *testing.T) {
	c := newContainerd(t)
	p := newPublisher("ns", c.path, logger(t))
	publish(p, 0, 50) // containerd is not there yet, and nobody waits for it
	c.up()
	expect(t, c, 0, 50)
	publish(p, 50, 60)
	expect(t, c, 50, 60)
	c.down() // it restarts
	publish(p, 60, 160)
	c.up()
	expect(t, c, 60, 160)
	if err := p.close(bounded(t)); err != nil {
		t.Error(err)
	}
}

func TestPublisherDeliversBeforeItCloses(t *testing.T) {
	c := newContainerd(t)
	c.up()
	p := newPublisher("ns", "unix://"+c.path, logger(t))
	publish(p, 0, 100)
	if err := p.close(bounded(t)); err != nil {
		t.Error(err)
	}
	if got := len(c.got); got != 100 {
		t.Errorf("%d of 100 events were delivered when close returned", got)
	}
}

// Closing with containerd gone is bounded, and tries once.
func TestPublisherClosesWithoutContainerd(t *testing.T) {
	c := newContainerd(t)
	p := newPublisher("ns", c.path, logger(t))
	publish(p, 0, 100)
	begin := time.Now()
	if err := p.close(bounded(t)); err != nil {
		t.Error(err)
	}
	if d := time.Since(begin); d > 2*time.Second {
		t.Errorf("it took %v", d)
	}
	select {
	case <-p.done:
	default:
		t.Error("it still runs")
	}
}

// More events than are kept: the oldest are lost, and publish never blocks.
func TestPublisherIsBounded(t *testing.T) {
	c := newContainerd(t)
	p := newPublisher("ns", c.path, logger(t))
	const extra = 100
	soon(t, "publish", func() error { publish(p, 0, queueLength+extra); return nil })
	c.up()
	// The one under delivery is taken from the front; of the rest the newest are
	// kept, in their order.
	var got []int
	for len(got) == 0 || got[len(got)-1] != queueLength+extra-1 {
		n, err := strconv.Atoi(number(t, c.next()))
		must(t, err)
		got = append(got, n)
	}
	if !slices.IsSorted(got) || len(got) > queueLength+1 || got[1] < extra-1 {
		t.Errorf("%d events, the first are %v", len(got), got[:3])
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if err := p.close(ctx); err != nil {
		t.Error(err)
	}
}
