// SPDX-License-Identifier: Apache-2.0

// Package guestsvc is the guest's half of the vsock conformance suite: small
// services that the host drives. It links nothing of package testing, so that
// it fits into the initrd of a real guest.
package guestsvc

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// Ports of the services.
const (
	EchoPort   = 5001 // sends back what it reads, then ends its side
	SinkPort   = 5002 // reads a seed, then a pattern to its end, and answers a SinkReply
	SourcePort = 5003 // reads a SourceRequest and sends that much of a pattern
	HoldPort   = 5004 // reads one byte, then nothing until GatePort is dialled, then to the end; answers the count
	GatePort   = 5005 // opens the gate for the streams that HoldPort holds
	DialPort   = 5006 // reads a host port, dials it, answers a Dial… byte and echoes on the new stream
	ExitPort   = 5007 // reads one byte, then ends the guest; only where Net has Exit
	PingPort   = 5008 // EchoPort by blocking system calls: for round trips
	ClosedPort = 5999 // nobody listens
)

// Answers of DialPort.
const (
	DialOK      = 'o'
	DialRefused = 'r' // the host reset the attempt
	DialFailed  = 'f'
)

// RawSeed as a seed means zeros that nobody checks: for throughput.
const RawSeed = 0

// Kernel parameters of a guest that runs a Server: the host port that Ready
// dials, and one by which the guest stops before its driver is up.
const (
	ReadyParam = "guestsvc.ready_port"
	StuckParam = "guestsvc.stuck"
	// SerialParam makes the guest use a virtio-serial port (package channel) in place of vsock.
	SerialParam = "guestsvc.serial"
	// MoveParam makes the guest move its interrupts between its first two CPUs all the time.
	MoveParam = "guestsvc.move_interrupts"
)

// Net is the guest's network: its listeners and dials are to vsock ports. Every
// connection has CloseWrite.
type Net struct {
	Listen func(port uint32) (net.Listener, error)
	Dial   func(hostPort uint32) (net.Conn, error)
	// Exit ends the guest as a crash does; nil leaves ExitPort closed.
	Exit func()
}

// Ready dials the host port that ReadyParam names on a kernel command line, and
// closes the stream again. Without the parameter nothing is done.
func Ready(n Net, commandLine string) error {
	for _, f := range strings.Fields(commandLine) {
		value, ok := strings.CutPrefix(f, ReadyParam+"=")
		if !ok {
			continue
		}
		port, err := strconv.ParseUint(value, 10, 32)
		if err != nil {
			return fmt.Errorf("%s: %w", ReadyParam, err)
		}
		c, err := n.Dial(uint32(port))
		if err != nil {
			return fmt.Errorf("dial the ready port: %w", err)
		}
		return c.Close()
	}
	return nil
}

// Server serves all ports.
type Server struct {
	net       Net
	listeners []net.Listener
	wg        sync.WaitGroup
	mu        sync.Mutex
	gate      chan struct{}
}

// Start opens all ports and serves them until Close.
func Start(n Net) (*Server, error) {
	s := &Server{net: n, gate: make(chan struct{})}
	services := map[uint32]func(net.Conn) error{
		EchoPort: echo, SinkPort: sink, SourcePort: source,
		HoldPort: s.hold, GatePort: s.openGate, DialPort: s.dial, PingPort: ping,
	}
	if n.Exit != nil {
		services[ExitPort] = s.exit
	}
	for port, f := range services {
		l, err := n.Listen(port)
		if err != nil {
			s.Close()
			return nil, fmt.Errorf("listen on %d: %w", port, err)
		}
		s.listeners = append(s.listeners, l)
		s.wg.Go(func() { s.serve(l, f) })
	}
	return s, nil
}

// Close ends the listeners and opens the gate; streams end with their peers.
func (s *Server) Close() {
	for _, l := range s.listeners {
		_ = l.Close()
	}
	s.wg.Wait()
	_ = s.openGate(nil)
}

func (s *Server) serve(l net.Listener, f func(net.Conn) error) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			_ = f(c) // the host sees what went wrong
		}()
	}
}

func closeWrite(c net.Conn) error {
	return c.(interface{ CloseWrite() error }).CloseWrite()
}

func echo(c net.Conn) error {
	b := make([]byte, 64<<10)
	for {
		n, err := c.Read(b)
		if n > 0 {
			if _, err := c.Write(b[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return closeWrite(c)
		}
		if err != nil {
			return err
		}
	}
}

// SinkReply is what SinkPort answers: the bytes read after the seed, and whether
// they were the pattern. Size 9, little endian.
type SinkReply struct {
	Count uint64
	Good  bool
}

func sink(c net.Conn) error {
	var seed [4]byte
	if _, err := io.ReadFull(c, seed[:]); err != nil {
		return err
	}
	p := NewPattern(binary.LittleEndian.Uint32(seed[:]))
	r := SinkReply{Good: true}
	b := make([]byte, 128<<10)
	for {
		n, err := c.Read(b)
		r.Count += uint64(n)
		r.Good = p.Check(b[:n]) && r.Good
		if errors.Is(err, io.EOF) {
			return binary.Write(c, binary.LittleEndian, r)
		}
		if err != nil {
			return err
		}
	}
}

// SourceRequest asks SourcePort for Total bytes in writes of Chunk bytes.
type SourceRequest struct {
	Total       uint64
	Chunk, Seed uint32
}

func source(c net.Conn) error {
	var r SourceRequest
	if err := binary.Read(c, binary.LittleEndian, &r); err != nil {
		return err
	}
	p := NewPattern(r.Seed)
	b := make([]byte, r.Chunk)
	for r.Total > 0 {
		b = b[:min(uint64(len(b)), r.Total)]
		p.Fill(b)
		if _, err := c.Write(b); err != nil {
			return err
		}
		r.Total -= uint64(len(b))
	}
	if err := closeWrite(c); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, c)
	return err
}

func (s *Server) hold(c net.Conn) error {
	s.mu.Lock()
	gate := s.gate
	s.mu.Unlock()
	var b [1]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return err
	}
	if _, err := c.Write(b[:]); err != nil { // held from now on
		return err
	}
	<-gate
	n, err := io.Copy(io.Discard, c)
	if err != nil {
		return err
	}
	return binary.Write(c, binary.LittleEndian, uint64(n))
}

func (s *Server) openGate(net.Conn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.gate)
	s.gate = make(chan struct{})
	return nil
}

func (s *Server) dial(c net.Conn) error {
	var port [4]byte
	if _, err := io.ReadFull(c, port[:]); err != nil {
		return err
	}
	h, err := s.net.Dial(binary.LittleEndian.Uint32(port[:]))
	answer := byte(DialOK)
	switch {
	case errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.ECONNREFUSED):
		answer = DialRefused
	case err != nil:
		answer = DialFailed
	default:
		defer h.Close()
	}
	if _, werr := c.Write([]byte{answer}); werr != nil || err != nil {
		return errors.Join(werr, err)
	}
	return echo(h)
}

func (s *Server) exit(c net.Conn) error {
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		return err
	}
	s.net.Exit()
	return nil
}

// Pattern is an endless byte string that depends on a seed and the position, so
// that lost, repeated and displaced bytes all show.
type Pattern struct {
	raw   bool
	state uint64
	word  [8]byte
	left  int // bytes of word not used yet
}

// NewPattern starts a pattern; RawSeed is the one that Check accepts anything for.
func NewPattern(seed uint32) *Pattern {
	return &Pattern{raw: seed == RawSeed, state: uint64(seed)*0x9e3779b97f4a7c15 | 1}
}

func (p *Pattern) next() uint64 { // xorshift64
	p.state ^= p.state << 13
	p.state ^= p.state >> 7
	p.state ^= p.state << 17
	return p.state
}

// Fill writes the next len(b) bytes to b.
func (p *Pattern) Fill(b []byte) {
	if p.raw {
		return
	}
	for len(b) > 0 {
		if p.left == 0 {
			for len(b) >= 8 {
				binary.LittleEndian.PutUint64(b, p.next())
				b = b[8:]
			}
			binary.LittleEndian.PutUint64(p.word[:], p.next())
			p.left = 8
		}
		n := copy(b, p.word[8-p.left:])
		p.left -= n
		b = b[n:]
	}
}

// Check reports whether b is the next len(b) bytes.
func (p *Pattern) Check(b []byte) bool {
	if p.raw {
		return true
	}
	want := make([]byte, len(b))
	p.Fill(want)
	return string(want) == string(b)
}
