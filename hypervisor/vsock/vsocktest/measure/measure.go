// SPDX-License-Identifier: Apache-2.0

// Package measure says how fast a machine's vsock is: the guest runs a
// guestsvc.Server (guestimage builds such a guest), the host drives it. It links
// nothing of package testing.
package measure

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	"github.com/kata-v2/kata/hypervisor/vsock"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/guestsvc"
)

// Dialer reaches the guest's ports: a hypervisor.VM or a vsock.Device.
type Dialer interface {
	Dial(ctx context.Context, port uint32) (net.Conn, error)
}

// readSize is what the host reads at once, at most.
const readSize = 256 << 10

// RoundTrip returns the median of n round trips of one byte over one stream.
func RoundTrip(ctx context.Context, d Dialer, n int) (time.Duration, error) {
	times, err := RoundTrips(ctx, d, n)
	if err != nil {
		return 0, err
	}
	slices.Sort(times)
	return times[len(times)/2], nil
}

// RoundTrips takes n round trips, at least one, of one byte over one stream and
// returns how long each took, in order.
func RoundTrips(ctx context.Context, d Dialer, n int) (times []time.Duration, err error) {
	err = on(ctx, d, guestsvc.PingPort, func(c net.Conn) error {
		var b [1]byte
		for range max(n, 1) {
			start := time.Now()
			if _, err := c.Write(b[:]); err != nil {
				return err
			}
			if _, err := io.ReadFull(c, b[:]); err != nil {
				return err
			}
			times = append(times, time.Since(start))
		}
		return nil
	})
	return times, err
}

// Up has the guest send total bytes in writes of write bytes and returns
// megabytes (10^6 bytes) per second, from the request to the last byte read.
func Up(ctx context.Context, d Dialer, total int64, write int) (rate float64, err error) {
	err = on(ctx, d, guestsvc.SourcePort, func(c net.Conn) error {
		start := time.Now()
		r := guestsvc.SourceRequest{Total: uint64(total), Chunk: uint32(write), Seed: guestsvc.RawSeed}
		if err := binary.Write(c, binary.LittleEndian, r); err != nil {
			return err
		}
		// The writer is hidden, so that the buffer is used.
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, c, make([]byte, readSize))
		if err == nil && n != total {
			err = fmt.Errorf("%d bytes came of %d", n, total)
		}
		rate = megabytes(total, start)
		return err
	})
	return rate, err
}

// Down sends total bytes to the guest in writes of write bytes and returns
// megabytes (10^6 bytes) per second, until the guest says that it has read all.
func Down(ctx context.Context, d Dialer, total int64, write int) (rate float64, err error) {
	err = on(ctx, d, guestsvc.SinkPort, func(c net.Conn) error {
		if err := binary.Write(c, binary.LittleEndian, uint32(guestsvc.RawSeed)); err != nil {
			return err
		}
		start, b := time.Now(), make([]byte, write)
		for left := total; left > 0; left -= int64(len(b)) {
			b = b[:min(int64(len(b)), left)]
			if _, err := c.Write(b); err != nil {
				return err
			}
		}
		if err := c.(vsock.HalfCloser).CloseWrite(); err != nil {
			return err
		}
		var r guestsvc.SinkReply
		if err := binary.Read(c, binary.LittleEndian, &r); err != nil {
			return fmt.Errorf("the guest's count: %w", err)
		}
		if r.Count != uint64(total) {
			return fmt.Errorf("the guest read %d bytes of %d", r.Count, total)
		}
		rate = megabytes(total, start)
		return nil
	})
	return rate, err
}

func megabytes(n int64, start time.Time) float64 {
	return float64(n) / 1e6 / time.Since(start).Seconds()
}

// on runs f with a stream to a port; ctx bounds both.
func on(ctx context.Context, d Dialer, port uint32, f func(net.Conn) error) error {
	c, err := d.Dial(ctx, port)
	if err != nil {
		return fmt.Errorf("measure vsock: %w", err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })()
	if err := f(c); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("measure vsock: port %d: %w", port, err)
	}
	return nil
}
