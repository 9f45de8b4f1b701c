// SPDX-License-Identifier: Apache-2.0

package vsock

import "encoding/binary"

// headerLen is the size of struct virtio_vsock_hdr (virtio 1.3 §5.10.6).
const headerLen = 44

// maxPayload bounds what one packet to the guest carries, whatever the size of
// the guest's buffer. Linux uses the same bound for its own packets.
const maxPayload = 64 << 10

// Socket types (virtio 1.3 §5.10.6.4); only streams are offered.
const typeStream = 1

// Operations (virtio 1.3 §5.10.6).
const (
	opRequest       = 1
	opResponse      = 2
	opRST           = 3
	opShutdown      = 4
	opRW            = 5
	opCreditUpdate  = 6
	opCreditRequest = 7
)

// Flags of opShutdown (virtio 1.3 §5.10.6.5).
const (
	shutRecv = 1 // the sender receives no more
	shutSend = 2 // the sender sends no more
	shutBoth = shutRecv | shutSend
)

// header is struct virtio_vsock_hdr.
type header struct {
	srcCID, dstCID   uint64
	srcPort, dstPort uint32
	length           uint32 // of the payload, bytes
	typ, op          uint16
	flags            uint32
	bufAlloc         uint32 // size of the sender's receive buffer, bytes
	fwdCnt           uint32 // bytes the sender's application took, modulo 2^32
}

func parseHeader(b *[headerLen]byte) header {
	le := binary.LittleEndian
	return header{
		srcCID: le.Uint64(b[0:]), dstCID: le.Uint64(b[8:]),
		srcPort: le.Uint32(b[16:]), dstPort: le.Uint32(b[20:]),
		length: le.Uint32(b[24:]),
		typ:    le.Uint16(b[28:]), op: le.Uint16(b[30:]),
		flags:    le.Uint32(b[32:]),
		bufAlloc: le.Uint32(b[36:]), fwdCnt: le.Uint32(b[40:]),
	}
}

func (h *header) put(b *[headerLen]byte) {
	le := binary.LittleEndian
	le.PutUint64(b[0:], h.srcCID)
	le.PutUint64(b[8:], h.dstCID)
	le.PutUint32(b[16:], h.srcPort)
	le.PutUint32(b[20:], h.dstPort)
	le.PutUint32(b[24:], h.length)
	le.PutUint16(b[28:], h.typ)
	le.PutUint16(b[30:], h.op)
	le.PutUint32(b[32:], h.flags)
	le.PutUint32(b[36:], h.bufAlloc)
	le.PutUint32(b[40:], h.fwdCnt)
}

// segments is a byte string spread over several pieces of memory, as a
// descriptor chain describes it.
type segments [][]byte

// copyOut copies bytes from offset off on into p and returns how many there were.
func (s segments) copyOut(p []byte, off uint64) int {
	n := 0
	for _, seg := range s {
		if off >= uint64(len(seg)) {
			off -= uint64(len(seg))
			continue
		}
		n += copy(p[n:], seg[off:])
		off = 0
		if n == len(p) {
			break
		}
	}
	return n
}

// copyIn copies p to offset off on and returns how much found room.
func (s segments) copyIn(p []byte, off uint64) int {
	n := 0
	for _, seg := range s {
		if off >= uint64(len(seg)) {
			off -= uint64(len(seg))
			continue
		}
		n += copy(seg[off:], p[n:])
		off = 0
		if n == len(p) {
			break
		}
	}
	return n
}
