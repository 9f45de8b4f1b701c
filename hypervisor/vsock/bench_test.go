// SPDX-License-Identifier: Apache-2.0

package vsock_test

import (
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"testing"

	"github.com/kata-v2/kata/hypervisor/vsock"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/guestsvc"
)

// The benchmarks run against the emulated guest: they show what this side costs.

func benchConn(b *testing.B, port uint32) net.Conn {
	b.Helper()
	u, err := vsock.NewUser(vsock.UserConfig{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	d, err := vsocktest.NewDriver(u.QEMUFile(), vsocktest.DriverConfig{Features: vsocktest.FeatEventIdx})
	if err != nil {
		b.Fatal(err)
	}
	g := vsocktest.NewGuest(d, vsock.DefaultGuestCID, 1)
	s, err := guestsvc.Start(guestsvc.Net{Listen: g.Listen, Dial: g.Dial})
	if err != nil {
		b.Fatal(err)
	}
	if err := g.Boot(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		s.Close()
		g.Close()
		_ = u.Close()
		d.Free()
	})
	c, err := u.Dial(context.Background(), port)
	if err != nil {
		b.Fatal(err)
	}
	return c
}

func BenchmarkRoundTrip(b *testing.B) {
	c := benchConn(b, guestsvc.EchoPort)
	var buf [1]byte
	for b.Loop() {
		_, _ = c.Write(buf[:])
		if _, err := io.ReadFull(c, buf[:]); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkToGuest(b *testing.B) {
	c := benchConn(b, guestsvc.SinkPort)
	_, _ = c.Write(make([]byte, 4))
	buf := make([]byte, 256<<10)
	b.SetBytes(int64(len(buf)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkFromGuest(b *testing.B) {
	c := benchConn(b, guestsvc.SourcePort)
	_ = binary.Write(c, binary.LittleEndian, guestsvc.SourceRequest{Total: 1 << 50, Chunk: 64 << 10, Seed: guestsvc.RawSeed})
	buf := make([]byte, 256<<10)
	b.SetBytes(int64(len(buf)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := io.ReadFull(c, buf); err != nil {
			b.Fatal(err)
		}
	}
}
