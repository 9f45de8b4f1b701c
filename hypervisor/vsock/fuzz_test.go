// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fuzzMemory is guest memory of two regions, the second after a hole.
func fuzzMemory(t testing.TB) memory {
	const size = 16 << 10
	b, err := unix.Mmap(-1, 0, 2*size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(b) })
	return memory{
		{gpa: 0, size: size, uva: 0, mem: b[:size]},
		{gpa: 2 * size, size: size, uva: 2 * size, mem: b[size:]},
	}
}

// FuzzRing lets the guest write whatever it likes into its rings.
func FuzzRing(f *testing.F) {
	const num = 8
	desc := func(addr uint64, length uint32, flags, next uint16) []byte {
		b := binary.LittleEndian.AppendUint64(nil, addr)
		b = binary.LittleEndian.AppendUint32(b, length)
		b = binary.LittleEndian.AppendUint16(b, flags)
		return binary.LittleEndian.AppendUint16(b, next)
	}
	avail := make([]byte, 256-128+8)
	binary.LittleEndian.PutUint16(avail[128+2:], 2) // the ring's avail part is at 256
	f.Add(append(append(desc(4096, 100, descNext, 1), append(desc(8192, 50, 0, 0), make([]byte, 96)...)...), avail...), false, false)
	f.Add(append(append(desc(4096, 4096, descWrite, 0), desc(0, 16, descIndirect, 0)...), append(make([]byte, 96), avail...)...), true, true)
	f.Add([]byte{0xff, 0xff, 0xff}, true, false)
	f.Fuzz(func(t *testing.T, ring []byte, write, eventIdx bool) {
		m := fuzzMemory(t)
		mem := m[0].mem
		copy(mem, ring)
		nd, na, nu := ringSizes(num)
		r, err := newVring(num, 0, mem[0:nd], mem[256:256+na], mem[512:512+nu], eventIdx)
		if err != nil {
			t.Fatal(err)
		}
		for range 4 * num {
			c, ok, err := r.pop(m, write)
			if err != nil || !ok {
				break
			}
			var total uint64
			for _, s := range c.segs {
				total += uint64(len(s))
			}
			if total != c.total || len(c.segs) > maxRingSize*len(m) {
				t.Fatalf("chain of %d bytes in %d segments says %d", total, len(c.segs), c.total)
			}
			var b [headerLen]byte
			c.segs.copyOut(b[:], 0)
			if write {
				c.segs.copyIn(b[:], 3)
			}
			r.push(c.head, 1)
			r.publish()
		}
		_, _ = r.arm()
	})
}

// FuzzPacketHeader sends any sequence of packets to a stack with listeners and
// streams and looks at what must hold whatever the guest sends.
func FuzzPacketHeader(f *testing.F) {
	packet := func(op uint16, host, guest, length, flags, alloc, fwd uint32) []byte {
		var b [headerLen]byte
		h := header{srcCID: 3, dstCID: HostCID, srcPort: guest, dstPort: host, length: length, typ: typeStream, op: op, flags: flags, bufAlloc: alloc, fwdCnt: fwd}
		h.put(&b)
		return b[:]
	}
	f.Add(append(append(packet(opRequest, 9, 5, 0, 0, 1000, 0), packet(opRW, 9, 5, 100, 0, 1000, 0)...), packet(opShutdown, 9, 5, 0, shutBoth, 0, 0)...))
	f.Add(append(append(packet(opResponse, firstPort, 7, 0, 0, 10, 0), packet(opCreditRequest, firstPort, 7, 0, 0, 10, 9)...), packet(opRST, firstPort, 7, 0, 0, 0, 0)...))
	f.Add(append(packet(opRequest, 9, 5, 0, 0, 0, 0), packet(opRW, 9, 5, 0xffff_ffff, 0, 0, 0)...))
	f.Add(append(packet(opRequest, firstPort, 7, 0, 0, 0, 0), packet(opRequest, 9, 1, 0, 0, 0, 0)...))
	f.Fuzz(func(t *testing.T, data []byte) {
		s := newStack(3)
		l, err := s.listen(9)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		dialled := make(chan struct{})
		go func() {
			defer close(dialled)
			if c, err := s.dial(ctx, 7); err == nil {
				_ = c.SetDeadline(time.Now().Add(-1))
				_, _ = c.Write([]byte("x"))
				_ = c.Close()
			}
		}()
		payload := segments{make([]byte, headerLen), make([]byte, 70<<10)}
		out := segments{make([]byte, 30), make([]byte, 500)}
		for ; len(data) >= headerLen; data = data[headerLen:] {
			h := parseHeader((*[headerLen]byte)(data))
			var again [headerLen]byte
			h.put(&again)
			if string(again[:]) != string(data[:headerLen]) {
				t.Fatalf("header changed: %x, %x", again, data[:headerLen])
			}
			h.length %= 70 << 10 // drain has compared it with the chain
			s.mu.Lock()
			s.receive(h, payload)
			for range 4 {
				if s.wanting() {
					if n := s.next(out, 530); n < headerLen || n > 530 {
						t.Fatalf("packet of %d bytes", n)
					}
				}
			}
			for _, c := range s.conns {
				if c.in.n > int(c.grant) || len(c.in.b) > maxBuffer {
					t.Errorf("%d bytes kept of %d granted", c.in.n, c.grant)
				}
			}
			s.mu.Unlock()
		}
		cancel()
		<-dialled
		_ = l.Close()
		s.mu.Lock()
		s.end(net.ErrClosed)
		if len(s.conns) != 0 || s.granted != 0 || len(s.dialPorts) != 0 {
			t.Errorf("left: %d streams, %d bytes granted, %d ports", len(s.conns), s.granted, len(s.dialPorts))
		}
		s.mu.Unlock()
	})
}

// FuzzVhostUserMessage sends any bytes to the control socket, with a descriptor
// of memory or of an event beside each request.
func FuzzVhostUserMessage(f *testing.F) {
	msg := func(req, flags uint32, payload ...uint64) []byte {
		b := binary.NativeEndian.AppendUint32(nil, req)
		b = binary.NativeEndian.AppendUint32(b, flags)
		b = binary.NativeEndian.AppendUint32(b, uint32(8*len(payload)))
		for _, p := range payload {
			b = binary.NativeEndian.AppendUint64(b, p)
		}
		return b
	}
	f.Add(append(msg(reqGetFeatures, 1), msg(reqSetFeatures, 1, featVersion1)...), byte(0))
	f.Add(msg(reqSetMemTable, 1, 1, 0, 65536, 0, 0), byte(1))
	f.Add(append(msg(reqAddMemReg, 1, 0, 0, 65536, 0, 0), msg(reqSetVringNum, 1, 128<<32)...), byte(1))
	f.Add(append(msg(reqSetVringAddr, 1, 0, 0, 8192, 4096, 0), msg(reqSetVringKick, 1, 0)...), byte(2))
	f.Add(append(msg(reqGetVringBase, 1, 1), msg(reqSetVringEnable, 1, 1<<32)...), byte(0))
	mfd, err := unix.MemfdCreate("fuzz", unix.MFD_CLOEXEC)
	if err != nil {
		f.Fatal(err)
	}
	efd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		f.Fatal(err)
	}
	if err := unix.Ftruncate(mfd, 1<<20); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte, kind byte) {
		u, err := NewUser(UserConfig{Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		file := u.QEMUFile()
		c, err := net.FileConn(file)
		_ = file.Close()
		if err != nil {
			t.Fatal(err)
		}
		drained := make(chan struct{})
		go func() {
			defer close(drained)
			_, _ = io.Copy(io.Discard, c) // the answers
		}()
		send(c.(*net.UnixConn), data, map[byte][]int{1: {mfd}, 2: {efd}, 3: {mfd, efd}}[kind])
		_ = c.(*net.UnixConn).CloseWrite()
		select {
		case <-u.Done():
		case <-time.After(10 * time.Second):
			t.Fatal("the device goes on without its VMM")
		}
		_ = c.Close()
		<-drained
	})
}

// send writes request by request, as far as data can be told apart.
func send(c *net.UnixConn, data []byte, fds []int) {
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	for len(data) > 0 {
		n := len(data)
		if n >= msgHeaderLen {
			n = min(n, msgHeaderLen+int(binary.NativeEndian.Uint32(data[8:])%maxMsgPayload))
		}
		if _, _, err := c.WriteMsgUnix(data[:n], oob, nil); err != nil {
			return
		}
		data = data[n:]
	}
}
