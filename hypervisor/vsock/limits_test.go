// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What a guest can make the stack hold, attacked packet by packet.

// bounded checks what must hold whatever the guest has sent.
func (st stackTest) bounded() {
	st.Helper()
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	if n := len(st.s.conns); n > maxConns {
		st.Errorf("%d streams; want at most %d", n, maxConns)
	}
	if n := len(st.s.resets); n > maxResets {
		st.Errorf("%d resets; want at most %d", n, maxResets)
	}
	if st.s.granted > maxGranted {
		st.Errorf("%d bytes granted; want at most %d", st.s.granted, maxGranted)
	}
}

// take lets the guest take n packets and returns how many there were.
func (st stackTest) take(n int) (got int) {
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	var b [512]byte
	for ; got < n && st.s.wanting(); got++ {
		st.s.next(segments{b[:]}, uint64(len(b)))
	}
	return got
}

func TestFloodsAreBounded(t *testing.T) {
	st := newStackTest(t)
	for i := range uint32(maxConns + 2*maxResets) {
		st.guest(opRequest, i, 0, 0)
		st.guest(opRW, 1<<20+i, 0, 0)
	}
	st.bounded()
	if n := len(st.s.conns); n != maxBacklog {
		t.Errorf("%d streams that nobody accepts; want %d", n, maxBacklog)
	}
	if n := len(st.s.resets); n != maxResets {
		t.Errorf("%d resets; want %d", n, maxResets)
	}
}

// TestStreamFlood: streams that are accepted and kept.
func TestStreamFlood(t *testing.T) {
	st := newStackTest(t)
	var kept []net.Conn
	for i := range uint32(maxConns + 10) {
		st.guest(opRequest, i, 0, 0)
		if len(st.l.(*listener).queue) == 0 {
			continue
		}
		c, err := st.l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		kept = append(kept, c)
	}
	st.bounded()
	if len(kept) != maxConns {
		t.Errorf("%d streams; want %d", len(kept), maxConns)
	}
	if _, err := st.s.dial(context.Background(), 1); !errors.Is(err, unix.ENOBUFS) {
		t.Errorf("dial: %v", err)
	}
	for _, c := range kept {
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if st.s.granted != 0 {
		t.Errorf("%d bytes granted to closed streams", st.s.granted)
	}
}

// TestResetKeepsGrant: bytes that a reset stream still holds count, or a guest
// could fill stream after stream with the same credit.
func TestResetKeepsGrant(t *testing.T) {
	st := newStackTest(t)
	var kept []net.Conn
	for i := range uint32(4 * budget / maxBuffer) {
		st.guest(opRequest, i, 0, 0)
		st.take(1)
		c, err := st.l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		kept = append(kept, c)
		st.guest(opRW, i, 0, int(c.(*conn).grant))
		st.guest(opRST, i, 0, 0)
	}
	st.bounded()
	held := 0
	for _, c := range kept {
		held += len(c.(*conn).in.b)
	}
	if held > st.s.granted || held > maxGranted || held == 0 {
		t.Errorf("%d bytes held, %d granted", held, st.s.granted)
	}
	for i, c := range kept {
		if i%2 == 0 { // read to the end, or closed
			if _, err := io.Copy(io.Discard, c); !errors.Is(err, unix.ECONNRESET) {
				t.Fatal(err)
			}
		}
		_ = c.Close()
	}
	if st.s.granted != 0 {
		t.Errorf("%d bytes granted when nothing is held", st.s.granted)
	}
}

// TestResetsBeforeAccept: a listener's queue holds what was reset, too.
func TestResetsBeforeAccept(t *testing.T) {
	st := newStackTest(t)
	for i := range uint32(10 * maxBacklog) {
		st.guest(opRequest, i, 0, 0)
		st.guest(opRW, i, 0, minGrant)
		st.guest(opRST, i, 0, 0)
		st.take(9)
	}
	st.bounded()
	if n := len(st.l.(*listener).queue); n != maxBacklog {
		t.Errorf("%d streams wait; want %d", n, maxBacklog)
	}
	if err := st.l.Close(); err != nil {
		t.Fatal(err)
	}
	if st.s.granted != 0 {
		t.Errorf("%d bytes granted to nobody", st.s.granted)
	}
}

// TestNoAmplification: a packet causes at most one, and an RST none.
func TestNoAmplification(t *testing.T) {
	for op := range uint16(9) {
		st := newStackTest(t)
		c := st.open(1)
		const n = 100
		for i := range uint32(n) {
			st.guest(op, 1, 0, 0)
			st.guest(op, 100+i, 0, 0)
		}
		most := 2 * n
		if op == opRST {
			most = 0
		}
		if got := st.take(10 * n); got > most {
			t.Errorf("operation %d: %d packets for %d", op, got, 2*n)
		}
		_ = c.Close()
		_ = st.l.Close()
	}
}

// credit is a packet by which the guest reports any credit.
func (st stackTest) credit(port, alloc, fwd uint32) {
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	st.s.receive(header{srcCID: 3, dstCID: HostCID, srcPort: port, dstPort: testPort, typ: typeStream,
		op: opCreditUpdate, bufAlloc: alloc, fwdCnt: fwd}, nil)
}

func TestCreditLies(t *testing.T) {
	for _, tt := range []struct {
		name       string
		alloc, fwd uint32
		sends      bool
	}{
		{"forwarded more than was sent", 1000, 5000, false},
		{"forwarded less than before", 300, 0xffff_ff00, false},
		{"buffer shrinks below what is under way", 50, 0, false},
		{"buffer of nothing", 0, 100, false},
		{"all there is", 0xffff_ffff, 100, true},
		{"wraps", 0xffff_ffff, 0xffff_ffff, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			st := newStackTest(t)
			c, other := st.open(1), st.open(2)
			st.s.mu.Lock()
			c.wbuf = make([]byte, 100) // as a blocked writer has it
			st.s.enqueue(c)
			st.s.mu.Unlock()
			st.host(opRW)
			st.s.mu.Lock()
			c.wbuf = make([]byte, 100)
			st.s.mu.Unlock()
			st.credit(1, tt.alloc, tt.fwd)
			if tt.sends {
				st.host(opRW)
			} else {
				st.host(opCreditRequest) // once
				st.credit(1, tt.alloc, tt.fwd)
				st.host()
			}
			st.s.mu.Lock()
			other.wbuf = make([]byte, 100)
			st.s.enqueue(other)
			st.s.mu.Unlock()
			st.host(opRW) // the stream beside it does not mind
		})
	}
}

// TestLingerEnds: a guest that never confirms the end of its streams keeps their
// names for lingerTime only, and none of their memory.
func TestLingerEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := newStackTest(t)
		const n = 100
		for i := range uint32(n) {
			c := st.open(i)
			st.guest(opRW, i, 0, 1000)
			_ = c.Close()
			st.host(opShutdown)
			st.guest(opRW, i, 0, 1000) // nobody reads
			st.host()
		}
		st.counts(n, 0)
		time.Sleep(lingerTime - time.Second)
		synctest.Wait()
		st.counts(n, 0)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		st.counts(0, n)
	})
}

// counts expects so many streams, without memory, and resets.
func (st stackTest) counts(streams, resets int) {
	st.Helper()
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	if len(st.s.conns) != streams || len(st.s.resets) != resets || st.s.granted != 0 {
		st.Errorf("%d streams with %d bytes, %d resets; want %d with none, %d", len(st.s.conns), st.s.granted, len(st.s.resets), streams, resets)
	}
}

// TestUnanswered: a guest that does not answer holds a dial for as long as the
// caller wants, and nothing afterwards.
func TestUnanswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStack(3)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		done := make(chan error)
		go func() {
			_, err := s.dial(ctx, 7)
			done <- err
		}()
		synctest.Wait()
		st := stackTest{t, s, nil}
		st.host(opRequest)
		if err := <-done; !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("dial: %v", err)
		}
		st.host(opRST)
		if len(s.conns) != 0 || len(s.dialPorts) != 0 || s.granted != 0 {
			t.Errorf("left: %d streams, %d ports, %d bytes", len(s.conns), len(s.dialPorts), s.granted)
		}
	})
}

func TestSizeOfStream(t *testing.T) {
	const doc, beside = 1 << 10, 400 // two channels, the tables' entries, a timer
	if n := unsafe.Sizeof(conn{}) + beside; n > doc {
		t.Errorf("a stream costs %d bytes; doc.go counts %d", n, doc)
	}
}

func TestManyRegions(t *testing.T) {
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "guest")
	defer f.Close()
	if err := f.Truncate(1 << 40); err != nil { // holes only
		t.Fatal(err)
	}
	var m memory
	defer func() { m.unmap() }()
	for i := range uint64(maxRegions) {
		r, err := mapRegion(fd, regionDesc{gpa: i << 34, size: 1 << 34, uva: i << 34})
		if err != nil {
			t.Fatal(err)
		}
		if m, err = m.with(r); err != nil {
			t.Fatal(err)
		}
	}
	r, err := mapRegion(fd, regionDesc{gpa: maxRegions << 34, size: 4096})
	if err != nil {
		t.Fatal(err)
	}
	defer r.unmap()
	if _, err := m.with(r); err == nil {
		t.Errorf("%d regions and one more: no error", maxRegions)
	}
	if _, err := m[:1].with(m[0]); err == nil {
		t.Error("the same region twice: no error")
	}
}
