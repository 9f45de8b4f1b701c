// SPDX-License-Identifier: Apache-2.0

// Package vsocktest is the conformance suite of vsock.Device: whatever carries
// a machine's vsock passes Run with a guest that runs guestsvc. It also holds an
// emulated guest (Driver, Guest), by which the vhost-user device is tested
// without a machine.
package vsocktest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kata-v2/kata/hypervisor/vsock"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/guestsvc"
)

// Config says what to test, and how much of it.
type Config struct {
	// Device under test; its guest runs a guestsvc.Server.
	Device vsock.Device
	// Bulk is how many bytes the digest test carries each way.
	Bulk int64
	// Streams is how many streams are open at once in the test of many.
	Streams int
	// Timeout bounds every subtest.
	Timeout time.Duration
}

type suite struct {
	*testing.T
	Config
}

// Run runs the whole suite as subtests of t.
func Run(t *testing.T, conf Config) {
	for _, tt := range []struct {
		name string
		f    func(*suite)
	}{
		{"Addresses", (*suite).addresses},
		{"WriteSizes", (*suite).writeSizes},
		{"SourceSizes", (*suite).sourceSizes},
		{"Refused", (*suite).refused},
		{"HalfCloseByHost", (*suite).halfCloseByHost},
		{"HalfCloseByGuest", (*suite).halfCloseByGuest},
		{"Deadlines", (*suite).deadlines},
		{"Listen", (*suite).listen},
		{"ListenerClose", (*suite).listenerClose},
		{"SlowReaderInGuest", (*suite).slowGuest},
		{"SlowReaderOnHost", (*suite).slowHost},
		{"CloseMidTransfer", (*suite).closeMidTransfer},
		{"Parallel", (*suite).parallel},
		{"ManyStreams", (*suite).manyStreams},
		{"Digest", (*suite).digest},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.f(&suite{T: t, Config: conf})
		})
	}
}

func (s *suite) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// dial opens a stream that the subtest closes and bounds.
func (s *suite) dial(port uint32) net.Conn {
	s.Helper()
	c, err := s.tryDial(port)
	s.must(err)
	s.Cleanup(func() { _ = c.Close() })
	return c
}

func (s *suite) tryDial(port uint32) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), s.Timeout)
	defer cancel()
	c, err := s.Device.Dial(ctx, port)
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(s.Timeout))
}

func closeWrite(c net.Conn) error { return c.(vsock.HalfCloser).CloseWrite() }

// checkEcho sends b in one write while it reads it back.
func checkEcho(c net.Conn, b []byte) error {
	werr := make(chan error, 1)
	go func() {
		_, err := c.Write(b)
		werr <- err
	}()
	got := make([]byte, len(b))
	_, rerr := io.ReadFull(c, got)
	if err := errors.Join(rerr, <-werr); err != nil {
		return fmt.Errorf("echo of %d bytes: %w", len(b), err)
	}
	if !bytes.Equal(got, b) {
		return fmt.Errorf("echo of %d bytes differs", len(b))
	}
	return nil
}

func pattern(seed uint32, n int) []byte {
	b := make([]byte, n)
	guestsvc.NewPattern(seed).Fill(b)
	return b
}

func (s *suite) addresses() {
	a, b := s.dial(guestsvc.EchoPort), s.dial(guestsvc.EchoPort)
	la, ok := a.LocalAddr().(vsock.Addr)
	lb, ok2 := b.LocalAddr().(vsock.Addr)
	if !ok || !ok2 || la.CID != vsock.HostCID || la.Port == lb.Port || la.Port == 0 {
		s.Errorf("local addresses %v and %v: want two ports of the host", a.LocalAddr(), b.LocalAddr())
	}
	if ra, ok := a.RemoteAddr().(vsock.Addr); !ok || ra.Port != guestsvc.EchoPort || ra.CID < 3 {
		s.Errorf("remote address %v", a.RemoteAddr())
	}
}

// sizes of single writes; 36 KiB is where guests begin to spread a packet over
// several descriptors.
var sizes = []int{1, 2, 43, 44, 4051, 4052, 4053, 4096, 36<<10 - 1, 36 << 10, 64 << 10, 64<<10 + 1, 100_000, 256 << 10, 256<<10 + 1, 1 << 20}

func (s *suite) writeSizes() {
	c := s.dial(guestsvc.EchoPort)
	for i, n := range sizes {
		s.must(checkEcho(c, pattern(uint32(i+1), n)))
	}
}

// source asks the guest for a pattern in writes of chunk bytes and checks it.
func (s *suite) source(total, chunk int) error {
	c, err := s.tryDial(guestsvc.SourcePort)
	if err != nil {
		return err
	}
	defer c.Close()
	r := guestsvc.SourceRequest{Total: uint64(total), Chunk: uint32(chunk), Seed: uint32(chunk)}
	if err := binary.Write(c, binary.LittleEndian, r); err != nil {
		return err
	}
	b, err := io.ReadAll(c)
	if err != nil || len(b) != total || !guestsvc.NewPattern(r.Seed).Check(b) {
		return fmt.Errorf("source of %d bytes in writes of %d: got %d, intact %v, %w", total, chunk, len(b), len(b) == total, err)
	}
	return nil
}

// sink sends total bytes in writes of chunk and has the guest check them.
func (s *suite) sink(total, chunk int) error {
	c, err := s.tryDial(guestsvc.SinkPort)
	if err != nil {
		return err
	}
	defer c.Close()
	seed := uint32(chunk)
	if err := binary.Write(c, binary.LittleEndian, seed); err != nil {
		return err
	}
	for b := pattern(seed, total); len(b) > 0; b = b[min(chunk, len(b)):] {
		if n, err := c.Write(b[:min(chunk, len(b))]); err != nil || n != min(chunk, len(b)) {
			return fmt.Errorf("sink: wrote %d: %w", n, err)
		}
	}
	if err := closeWrite(c); err != nil {
		return err
	}
	var r guestsvc.SinkReply
	if err := binary.Read(c, binary.LittleEndian, &r); err != nil {
		return fmt.Errorf("sink reply: %w", err)
	}
	if r.Count != uint64(total) || !r.Good {
		return fmt.Errorf("sink of %d bytes in writes of %d: %+v", total, chunk, r)
	}
	return nil
}

func (s *suite) sourceSizes() {
	for _, n := range sizes {
		total := n * max(1, min(150_000/n, 200))
		s.must(s.source(total, n))
		s.must(s.sink(total, n))
	}
}

func (s *suite) refused() {
	c, err := s.tryDial(guestsvc.ClosedPort)
	if c != nil {
		_ = c.Close()
	}
	var op *net.OpError
	if !errors.Is(err, syscall.ECONNREFUSED) || !errors.As(err, &op) || op.Net != "vsock" {
		s.Errorf("dial of a closed port: %v; want ECONNREFUSED in a *net.OpError", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := s.Device.Dial(ctx, guestsvc.EchoPort); !errors.Is(err, context.Canceled) {
		s.Errorf("dial with a cancelled context: %v", err)
	}
}

func (s *suite) halfCloseByHost() {
	c := s.dial(guestsvc.EchoPort)
	want := pattern(9, 300_000)
	go func() {
		_, _ = c.Write(want)
		_ = closeWrite(c)
	}()
	got, err := io.ReadAll(c) // the guest's EOF comes after our own
	s.must(err)
	if !bytes.Equal(got, want) {
		s.Errorf("%d bytes came back of %d", len(got), len(want))
	}
	if _, err := c.Write([]byte("x")); err == nil {
		s.Error("write after CloseWrite: no error")
	}
}

func (s *suite) halfCloseByGuest() {
	c := s.dial(guestsvc.SourcePort)
	s.must(binary.Write(c, binary.LittleEndian, guestsvc.SourceRequest{Total: 10, Chunk: 10, Seed: 1}))
	b, err := io.ReadAll(c)
	s.must(err)
	if len(b) != 10 {
		s.Errorf("%d bytes", len(b))
	}
	// The guest has ended its side only and still reads.
	_, err = c.Write(pattern(1, 600_000))
	s.must(err)
	s.must(c.Close())
	if _, err := c.Read(b); !errors.Is(err, net.ErrClosed) {
		s.Errorf("read after Close: %v", err)
	}
	if err := c.Close(); !errors.Is(err, net.ErrClosed) {
		s.Errorf("second Close: %v", err)
	}
}

func (s *suite) deadlines() {
	c := s.dial(guestsvc.HoldPort)
	var b [1]byte
	s.must(c.SetReadDeadline(time.Now().Add(20 * time.Millisecond)))
	_, err := c.Read(b[:])
	var ne net.Error
	if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &ne) || !ne.Timeout() {
		s.Errorf("read: %v", err)
	}
	s.must(c.SetReadDeadline(time.Now().Add(-time.Second)))
	if _, err := c.Read(b[:]); !errors.Is(err, os.ErrDeadlineExceeded) {
		s.Errorf("read with a deadline in the past: %v", err)
	}
	s.must(c.SetReadDeadline(time.Now().Add(s.Timeout)))
	_, err = c.Write([]byte{7})
	s.must(err)
	_, err = io.ReadFull(c, b[:])
	s.must(err)
	// The guest reads no more now: the write must stop for want of credit.
	bulk := make([]byte, 16<<20)
	s.must(c.SetWriteDeadline(time.Now().Add(250 * time.Millisecond)))
	n, err := c.Write(bulk)
	if !errors.Is(err, os.ErrDeadlineExceeded) || n == 0 || n == 16<<20 {
		s.Errorf("write to a guest that does not read: %d, %v", n, err)
	}
	s.must(c.SetDeadline(time.Now().Add(s.Timeout)))
	s.openGate()
	s.must(closeWrite(c))
	var count uint64
	s.must(binary.Read(c, binary.LittleEndian, &count))
	if count != uint64(n) {
		s.Errorf("the guest has read %d bytes of %d that were reported as written", count, n)
	}
}

func (s *suite) openGate() {
	c := s.dial(guestsvc.GatePort)
	_, err := c.Read(make([]byte, 1))
	if !errors.Is(err, io.EOF) {
		s.Fatalf("gate: %v", err)
	}
}

// dialBack has the guest dial a port of the host and returns its answer.
func (s *suite) dialBack(port uint32) (net.Conn, byte) {
	s.Helper()
	c := s.dial(guestsvc.DialPort)
	s.must(binary.Write(c, binary.LittleEndian, port))
	var b [1]byte
	_, err := io.ReadFull(c, b[:])
	s.must(err)
	return c, b[0]
}

func (s *suite) listenOn(port uint32) (net.Listener, uint32) {
	s.Helper()
	l, err := s.Device.Listen(port)
	s.must(err)
	s.Cleanup(func() { _ = l.Close() })
	return l, l.Addr().(vsock.Addr).Port
}

func (s *suite) listen() {
	l, port := s.listenOn(0)
	if l2, err := s.Device.Listen(port); !errors.Is(err, syscall.EADDRINUSE) {
		s.Errorf("second listener on a port: %v, %v", l2, err)
	}
	for i := range 3 {
		if _, answer := s.dialBack(port); answer != guestsvc.DialOK {
			s.Fatalf("dial %d: answer %q", i, answer)
		}
		c, err := l.Accept()
		s.must(err)
		s.must(c.SetDeadline(time.Now().Add(s.Timeout)))
		if c.LocalAddr() != (vsock.Addr{CID: vsock.HostCID, Port: port}) || c.RemoteAddr().(vsock.Addr).Port == 0 {
			s.Errorf("addresses %v, %v", c.LocalAddr(), c.RemoteAddr())
		}
		s.must(checkEcho(c, pattern(5, 100_000)))
		s.must(c.Close())
	}
}

func (s *suite) listenerClose() {
	l, port := s.listenOn(0)
	accepted := make(chan error, 1)
	go func() {
		_, err := l.Accept()
		accepted <- err
	}()
	s.must(l.Close())
	if err := <-accepted; !errors.Is(err, net.ErrClosed) {
		s.Errorf("Accept on a closed listener: %v", err)
	}
	if _, answer := s.dialBack(port); answer != guestsvc.DialRefused {
		s.Errorf("dial of a closed listener: answer %q", answer)
	}
	_, again := s.listenOn(port)
	if again != port {
		s.Errorf("listening on %d again gave %d", port, again)
	}
	// A stream that nobody accepts dies with its listener.
	l2, port2 := s.listenOn(0)
	c, answer := s.dialBack(port2)
	if answer != guestsvc.DialOK {
		s.Fatalf("answer %q", answer)
	}
	s.must(l2.Close())
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		s.Errorf("the guest kept a stream that was never accepted: %v", err)
	}
}

// slowGuest fills a stream whose reader in the guest sleeps, and uses others.
func (s *suite) slowGuest() {
	slow := s.dial(guestsvc.HoldPort)
	_, err := slow.Write([]byte{1})
	s.must(err)
	_, err = io.ReadFull(slow, make([]byte, 1))
	s.must(err)
	const total = 2 << 20
	werr := make(chan error, 1)
	go func() {
		_, err := slow.Write(make([]byte, total))
		werr <- errors.Join(err, closeWrite(slow))
	}()
	for range 3 {
		s.must(s.sink(300_000, 50_000))
		s.must(s.source(300_000, 50_000))
	}
	select {
	case err := <-werr:
		s.Fatalf("a write of %d bytes ended although nobody reads: %v", total, err)
	default:
	}
	s.openGate()
	s.must(<-werr)
	var n uint64
	s.must(binary.Read(slow, binary.LittleEndian, &n))
	if n != total {
		s.Errorf("the guest read %d of %d", n, total)
	}
}

// slowHost leaves streams unread on the host and uses others.
func (s *suite) slowHost() {
	const total = 768 << 10
	var slow []net.Conn
	for range 4 {
		c := s.dial(guestsvc.SourcePort)
		s.must(binary.Write(c, binary.LittleEndian, guestsvc.SourceRequest{Total: total, Chunk: 50_000, Seed: 3}))
		slow = append(slow, c)
	}
	for range 3 {
		s.must(s.sink(300_000, 50_000))
		s.must(s.source(300_000, 50_000))
	}
	for _, c := range slow {
		b, err := io.ReadAll(c)
		if err != nil || len(b) != total || !guestsvc.NewPattern(3).Check(b) {
			s.Errorf("slow stream: %d bytes, %v", len(b), err)
		}
	}
}

// closeMidTransfer closes streams with data under way in both directions; a
// stream beside them goes on.
func (s *suite) closeMidTransfer() {
	other := s.dial(guestsvc.EchoPort)
	for i := range 10 {
		src, snk, ech := s.dial(guestsvc.SourcePort), s.dial(guestsvc.SinkPort), s.dial(guestsvc.EchoPort)
		s.must(binary.Write(src, binary.LittleEndian, guestsvc.SourceRequest{Total: 1 << 30, Chunk: 100_000, Seed: 3}))
		_, err := io.ReadFull(src, make([]byte, 1000*i))
		s.must(err)
		var wg sync.WaitGroup
		for _, c := range []net.Conn{snk, ech} {
			wg.Go(func() {
				b := make([]byte, 100_000)
				for {
					if _, err := c.Write(b); err != nil {
						if !errors.Is(err, net.ErrClosed) {
							s.Errorf("write on a closed stream: %v", err)
						}
						return
					}
				}
			})
		}
		s.must(checkEcho(other, pattern(2, 200_000)))
		for _, c := range []net.Conn{src, snk, ech} {
			s.must(c.Close())
		}
		wg.Wait()
		s.must(checkEcho(other, pattern(2, 200_000)))
	}
}

func (s *suite) parallel() {
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			c, err := s.tryDial(guestsvc.EchoPort)
			if err != nil {
				s.Error(err)
				return
			}
			defer c.Close()
			for j, n := range []int{1, 5000, 36 << 10, 100_000} {
				if err := checkEcho(c, pattern(uint32(i*10+j+1), n)); err != nil {
					s.Errorf("stream %d: %v", i, err)
				}
			}
		})
	}
	wg.Wait()
}

func (s *suite) manyStreams() {
	conns := make([]net.Conn, s.Streams)
	for i := range conns {
		conns[i] = s.dial(guestsvc.EchoPort)
	}
	for i, c := range conns {
		s.must(checkEcho(c, pattern(uint32(i+1), 100)))
	}
	for i, c := range conns { // in another order than they were opened
		if i%2 == 0 {
			s.must(c.Close())
		}
	}
	for i, c := range conns {
		if i%2 == 1 {
			s.must(checkEcho(c, pattern(uint32(i+1), 100)))
		}
	}
}

func (s *suite) digest() {
	c := s.dial(guestsvc.EchoPort)
	sent, got := sha256.New(), sha256.New()
	werr := make(chan error, 1)
	go func() {
		p := guestsvc.NewPattern(77)
		b := make([]byte, 123_457)
		for left := s.Bulk; left > 0; {
			b = b[:min(int64(len(b)), left)]
			p.Fill(b)
			sent.Write(b)
			if _, err := c.Write(b); err != nil {
				werr <- err
				return
			}
			left -= int64(len(b))
		}
		werr <- closeWrite(c)
	}()
	n, err := io.Copy(got, c)
	if err := errors.Join(err, <-werr); err != nil || n != s.Bulk {
		s.Fatalf("%d of %d bytes came back: %v", n, s.Bulk, err)
	}
	if !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
		s.Error("digests differ")
	}
}
