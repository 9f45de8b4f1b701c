// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// The vhost-user wire (QEMU's docs/interop/vhost-user.rst): a header of three
// 32-bit words in host byte order, a payload, and descriptors beside the header.

// Requests of the front-end.
const (
	reqGetFeatures      = 1
	reqSetFeatures      = 2
	reqSetOwner         = 3
	reqResetOwner       = 4
	reqSetMemTable      = 5
	reqSetVringNum      = 8
	reqSetVringAddr     = 9
	reqSetVringBase     = 10
	reqGetVringBase     = 11
	reqSetVringKick     = 12
	reqSetVringCall     = 13
	reqSetVringErr      = 14
	reqGetProtoFeatures = 15
	reqSetProtoFeatures = 16
	reqGetQueueNum      = 17
	reqSetVringEnable   = 18
	reqGetConfig        = 24
	reqSetConfig        = 25
	reqResetDevice      = 34
	reqGetMaxMemSlots   = 36
	reqAddMemReg        = 37
	reqRemMemReg        = 38
)

// Header flags.
const (
	msgVersion   = 1
	msgVerMask   = 3
	msgReply     = 1 << 2
	msgNeedReply = 1 << 3
)

// Device features (virtio 1.3 §6, vhost-user). VIRTIO_F_INDIRECT_DESC is left out:
// a guest without it need not allocate a table for each packet, and a ring of 128
// holds more than a stream's credit anyway (docs/decisions.md).
const (
	featEventIdx      = 1 << 29
	featProtoFeatures = 1 << 30
	featVersion1      = 1 << 32
	features          = featEventIdx | featProtoFeatures | featVersion1
)

// Protocol features (vhost-user).
const (
	protoMQ          = 1 << 0
	protoReplyAck    = 1 << 3
	protoConfig      = 1 << 9
	protoResetDevice = 1 << 13
	protoMemSlots    = 1 << 15
	protoFeatures    = protoMQ | protoReplyAck | protoConfig | protoResetDevice | protoMemSlots
)

const (
	msgHeaderLen  = 12
	maxMsgPayload = 4096 // the longest known request is SET_MEM_TABLE with some 300 bytes
	maxMsgFDs     = 8
	tableRegions  = 8 // of one SET_MEM_TABLE, by the protocol
	vringNoFD     = 1 << 8
	maxConfig     = 256 // VHOST_USER_MAX_CONFIG_SIZE
)

// message is one request with the descriptors that came beside it.
type message struct {
	req, flags uint32
	payload    []byte
	fds        []int
}

// close gives back the descriptors that nobody has taken.
func (m *message) close() {
	for _, fd := range m.fds {
		_ = unix.Close(fd)
	}
	m.fds = nil
}

// takeFD hands out the message's only descriptor.
func (m *message) takeFD() (int, error) {
	if len(m.fds) != 1 {
		return -1, fmt.Errorf("%d descriptors; want 1", len(m.fds))
	}
	fd := m.fds[0]
	m.fds = nil
	return fd, nil
}

// words reads the payload as exactly n numbers of 64 bits.
func (m *message) words(n int) ([]uint64, error) {
	if len(m.payload) != 8*n {
		return nil, fmt.Errorf("payload of %d bytes; want %d", len(m.payload), 8*n)
	}
	w := make([]uint64, n)
	for i := range w {
		w[i] = binary.NativeEndian.Uint64(m.payload[8*i:])
	}
	return w, nil
}

// state reads the payload as a ring's index and a number.
func (m *message) state() (index, num uint32, err error) {
	if len(m.payload) != 8 {
		return 0, 0, fmt.Errorf("payload of %d bytes; want 8", len(m.payload))
	}
	return binary.NativeEndian.Uint32(m.payload), binary.NativeEndian.Uint32(m.payload[4:]), nil
}

// parseMsgHeader checks the fixed part of a request.
func parseMsgHeader(b []byte) (req, flags, size uint32, err error) {
	ne := binary.NativeEndian
	req, flags, size = ne.Uint32(b), ne.Uint32(b[4:]), ne.Uint32(b[8:])
	if flags&msgVerMask != msgVersion || flags&msgReply != 0 {
		return 0, 0, 0, fmt.Errorf("vhost-user request %d: flags %#x; want version 1 and no reply", req, flags)
	}
	if size > maxMsgPayload {
		return 0, 0, 0, fmt.Errorf("vhost-user request %d: payload of %d bytes; want at most %d", req, size, maxMsgPayload)
	}
	return req, flags, size, nil
}

// readMessage reads one request; io.EOF when the front-end has closed between two.
func readMessage(c *net.UnixConn) (*message, error) {
	var h [msgHeaderLen]byte
	oob := make([]byte, unix.CmsgSpace(4*maxMsgFDs))
	n, oobn, flags, _, err := c.ReadMsgUnix(h[:], oob)
	if err != nil {
		return nil, err
	}
	m := &message{}
	if m.fds, err = parseRights(oob[:oobn], flags); err != nil {
		m.close()
		return nil, err
	}
	if n == 0 {
		m.close()
		return nil, io.EOF
	}
	if _, err := io.ReadFull(c, h[n:]); err != nil {
		m.close()
		return nil, fmt.Errorf("vhost-user header: %w", err)
	}
	var size uint32
	if m.req, m.flags, size, err = parseMsgHeader(h[:]); err == nil && size > 0 {
		m.payload = make([]byte, size)
		if _, err = io.ReadFull(c, m.payload); err != nil {
			err = fmt.Errorf("vhost-user request %d: payload: %w", m.req, err)
		}
	}
	if err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

// parseRights collects passed descriptors; on error those collected are returned too.
func parseRights(oob []byte, flags int) ([]int, error) {
	var fds []int
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("vhost-user control message: %w", err)
	}
	for i := range cmsgs {
		got, err := unix.ParseUnixRights(&cmsgs[i])
		if err != nil {
			return fds, fmt.Errorf("vhost-user control message: %w", err)
		}
		fds = append(fds, got...)
	}
	if flags&unix.MSG_CTRUNC != 0 || len(fds) > maxMsgFDs {
		return fds, errors.New("vhost-user message with too many descriptors")
	}
	return fds, nil
}

// reply answers m.
func reply(c *net.UnixConn, m *message, payload []byte) error {
	b := make([]byte, msgHeaderLen, msgHeaderLen+len(payload))
	ne := binary.NativeEndian
	ne.PutUint32(b, m.req)
	ne.PutUint32(b[4:], msgVersion|msgReply)
	ne.PutUint32(b[8:], uint32(len(payload)))
	if _, err := c.Write(append(b, payload...)); err != nil {
		return fmt.Errorf("vhost-user reply to request %d: %w", m.req, err)
	}
	return nil
}

func u64(v uint64) []byte { return binary.NativeEndian.AppendUint64(nil, v) }
