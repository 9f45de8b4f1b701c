// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"errors"
	"io"
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// stackTest plays the guest, packet by packet.
type stackTest struct {
	*testing.T
	s *stack
	l net.Listener
}

const testPort = 9

func newStackTest(t *testing.T) stackTest {
	s := newStack(3)
	l, err := s.listen(testPort)
	if err != nil {
		t.Fatal(err)
	}
	return stackTest{t, s, l}
}

// guest sends one packet with n bytes of payload.
func (st stackTest) guest(op uint16, port, flags uint32, n int) {
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	h := header{srcCID: 3, dstCID: HostCID, srcPort: port, dstPort: testPort, length: uint32(n), typ: typeStream, op: op, flags: flags, bufAlloc: 1000}
	st.s.receive(h, segments{make([]byte, headerLen), make([]byte, n)})
}

// host expects exactly these operations as the next packets.
func (st stackTest) host(ops ...uint16) {
	st.Helper()
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	for i, op := range ops {
		if !st.s.wanting() {
			st.Fatalf("packet %d: none; want %d", i, op)
		}
		var b [4096]byte
		st.s.next(segments{b[:10], b[10:]}, uint64(len(b)))
		if h := parseHeader((*[headerLen]byte)(b[:])); h.op != op {
			st.Fatalf("packet %d: %+v; want %d", i, h, op)
		}
	}
	if st.s.wanting() {
		st.Fatal("one packet more than expected")
	}
}

// open opens a stream from a port of the guest.
func (st stackTest) open(port uint32) *conn {
	st.Helper()
	st.guest(opRequest, port, 0, 0)
	st.host(opResponse)
	c, err := st.l.Accept()
	if err != nil {
		st.Fatal(err)
	}
	return c.(*conn)
}

func TestGuestOverrunsCredit(t *testing.T) {
	st := newStackTest(t)
	c, other := st.open(1), st.open(2)
	for range maxBuffer / (64 << 10) {
		st.guest(opRW, 1, 0, 64<<10)
	}
	st.host() // nothing was read: no news
	st.guest(opRW, 1, 0, 1)
	st.host(opRST)
	if n, err := io.Copy(io.Discard, c); n != maxBuffer || !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("read %d bytes, %v; want what was granted, then a reset", n, err)
	}
	st.guest(opRW, 2, 0, 5)
	if n, err := other.Read(make([]byte, 9)); n != 5 || err != nil {
		t.Errorf("the stream beside it: %d, %v", n, err)
	}
}

func TestCreditIsTold(t *testing.T) {
	st := newStackTest(t)
	c := st.open(1)
	for range 3 {
		st.guest(opRW, 1, 0, maxBuffer/2-1)
		if _, err := io.ReadFull(c, make([]byte, maxBuffer/2-1)); err != nil {
			t.Fatal(err)
		}
		st.host()
		st.guest(opRW, 1, 0, 1)
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		st.host(opCreditUpdate)
	}
	st.guest(opCreditRequest, 1, 0, 0)
	st.host(opCreditUpdate)
}

func TestGuestShutsBothDirections(t *testing.T) {
	st := newStackTest(t)
	c := st.open(1)
	st.guest(opRW, 1, 0, 5)
	st.guest(opShutdown, 1, shutSend, 0)
	st.host()
	st.guest(opShutdown, 1, shutRecv, 0)
	st.host(opRST) // which lets the guest forget the stream
	if n, err := io.Copy(io.Discard, c); n != 5 || err != nil {
		t.Errorf("read %d bytes, %v", n, err)
	}
	if _, err := c.Write([]byte("x")); !errors.Is(err, unix.EPIPE) {
		t.Errorf("write: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	st.host()
	if len(st.s.conns) != 0 || st.s.granted != 0 {
		t.Errorf("%d streams and %d bytes left", len(st.s.conns), st.s.granted)
	}
}

func TestDataAfterShutdown(t *testing.T) {
	st := newStackTest(t)
	st.open(1)
	st.guest(opShutdown, 1, shutSend, 0)
	st.guest(opRW, 1, 0, 5)
	st.host(opRST)
}

func TestRequestForLivingStream(t *testing.T) {
	st := newStackTest(t)
	c := st.open(1)
	st.guest(opRequest, 1, 0, 0)
	st.host(opRST)
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("read: %v", err)
	}
	// One that the host has closed makes room for its successor.
	c = st.open(1)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	st.host(opShutdown)
	c = st.open(1)
	st.guest(opRW, 1, 0, 5)
	if n, err := c.Read(make([]byte, 9)); n != 5 || err != nil {
		t.Errorf("read: %d, %v", n, err)
	}
}

func TestUnknownStreamsAndForeigners(t *testing.T) {
	st := newStackTest(t)
	for _, op := range []uint16{opResponse, opRW, opShutdown, opCreditUpdate, opCreditRequest, 0, 99} {
		st.guest(op, 77, 0, 0)
		st.host(opRST)
	}
	st.guest(opRST, 77, 0, 0) // an RST is never answered
	st.host()
	for _, h := range []header{
		{srcCID: 4, dstCID: HostCID, op: opRequest, typ: typeStream, dstPort: testPort},
		{srcCID: 3, dstCID: 5, op: opRequest, typ: typeStream, dstPort: testPort},
	} {
		st.s.mu.Lock()
		st.s.receive(h, nil)
		st.s.mu.Unlock()
		st.host()
	}
	st.s.mu.Lock()
	st.s.receive(header{srcCID: 3, dstCID: HostCID, op: opRequest, typ: 2, dstPort: testPort}, nil)
	st.s.mu.Unlock()
	st.host(opRST) // no seqpacket
}

func TestFairness(t *testing.T) {
	st := newStackTest(t)
	big, small := st.open(1), st.open(2)
	st.s.mu.Lock()
	for _, c := range []*conn{big, small} { // as two blocked writers have it
		c.wbuf = make([]byte, 1000)
		st.s.enqueue(c)
	}
	var order []uint32
	for range 4 {
		var b [headerLen + 300]byte
		st.s.next(segments{b[:]}, uint64(len(b)))
		order = append(order, parseHeader((*[headerLen]byte)(b[:])).dstPort)
	}
	st.s.end(net.ErrClosed)
	st.s.mu.Unlock()
	if order[0] == order[1] || order[0] != order[2] || order[1] != order[3] {
		t.Errorf("packets went to ports %v; want them to take turns", order)
	}
}
