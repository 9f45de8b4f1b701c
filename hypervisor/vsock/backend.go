// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// handle does what one request asks for. An error ends the device: QEMU either
// speaks the protocol or is not to be trusted with our address space.
func (d *User) handle(m *message) error {
	answer, err := d.dispatch(m)
	if errors.Is(err, errUnknown) && d.acks(m) {
		d.log.Debug("vsock: unknown vhost-user request", "request", m.req)
		return reply(d.ctl, m, u64(1))
	}
	if err != nil {
		if d.acks(m) {
			_ = reply(d.ctl, m, u64(1)) // tells QEMU why the socket closes
		}
		return err
	}
	if answer != nil {
		return reply(d.ctl, m, answer)
	}
	if d.acks(m) {
		return reply(d.ctl, m, u64(0))
	}
	return nil
}

var errUnknown = errors.New("not known")

func (d *User) acks(m *message) bool {
	return m.flags&msgNeedReply != 0 && d.proto&protoReplyAck != 0
}

// dispatch returns the payload of the answer, nil for requests that have none.
func (d *User) dispatch(m *message) ([]byte, error) {
	switch m.req {
	case reqGetFeatures:
		return u64(features), nil
	case reqGetProtoFeatures:
		return u64(protoFeatures), nil
	case reqGetQueueNum:
		return u64(numQueues), nil
	case reqGetMaxMemSlots:
		return u64(maxRegions), nil
	case reqSetFeatures:
		return nil, m.features(&d.features, features)
	case reqSetProtoFeatures:
		return nil, m.features(&d.proto, protoFeatures)
	case reqSetOwner:
		return nil, nil
	case reqResetOwner, reqResetDevice:
		d.resetDevice()
		return nil, nil
	case reqGetConfig:
		return d.getConfig(m)
	case reqSetConfig:
		return nil, errors.New("the configuration of a vsock device is read only")
	case reqSetMemTable, reqAddMemReg, reqRemMemReg:
		return nil, d.setMemory(m)
	case reqSetVringKick, reqSetVringCall, reqSetVringErr:
		return nil, d.setVringFile(m)
	case reqSetVringAddr:
		return nil, d.setVringAddr(m)
	case reqSetVringNum, reqSetVringBase, reqGetVringBase, reqSetVringEnable:
		return d.setVring(m)
	}
	return nil, errUnknown
}

// features takes a set of features and checks it against what was offered.
func (m *message) features(dst *uint64, offered uint64) error {
	w, err := m.words(1)
	if err != nil {
		return err
	}
	if extra := w[0] &^ offered; extra != 0 {
		return fmt.Errorf("features %#x were not offered", extra)
	}
	*dst = w[0]
	return nil
}

// resetDevice forgets the rings; memory and features are set anew afterwards.
func (d *User) resetDevice() {
	for i := range d.queues {
		q := &d.queues[i]
		d.stopQueue(q)
		q.enabled = false
	}
}

// getConfig answers with struct virtio_vsock_config: the guest's CID (virtio
// 1.3 §5.10.4). What lies beyond reads as zero.
func (d *User) getConfig(m *message) ([]byte, error) {
	if len(m.payload) < 12 {
		return nil, fmt.Errorf("payload of %d bytes; want at least 12", len(m.payload))
	}
	off, size := binary.NativeEndian.Uint32(m.payload), binary.NativeEndian.Uint32(m.payload[4:])
	if off > maxConfig || size > maxConfig-off || uint64(len(m.payload)) != 12+uint64(size) {
		return nil, fmt.Errorf("configuration of %d bytes at %d in a payload of %d", size, off, len(m.payload))
	}
	var config [maxConfig]byte
	binary.LittleEndian.PutUint64(config[:], d.cid)
	answer := slices.Clone(m.payload)
	copy(answer[12:], config[off:off+size])
	return answer, nil
}

// queue finds the ring that a request names.
func (d *User) queue(index uint32) (*queue, error) {
	if index >= numQueues {
		return nil, fmt.Errorf("queue %d of %d", index, numQueues)
	}
	return &d.queues[index], nil
}

// stoppedQueue is queue for requests that a running ring does not allow.
func (d *User) stoppedQueue(index uint32) (*queue, error) {
	q, err := d.queue(index)
	if err == nil && q.ring != nil {
		return nil, fmt.Errorf("queue %d is running", index)
	}
	return q, err
}

// setVring handles the requests that carry an index and a number.
func (d *User) setVring(m *message) ([]byte, error) {
	index, num, err := m.state()
	if err != nil {
		return nil, err
	}
	find := d.stoppedQueue
	if m.req == reqGetVringBase || m.req == reqSetVringEnable {
		find = d.queue
	}
	q, err := find(index)
	if err != nil {
		return nil, err
	}
	switch m.req {
	case reqSetVringNum:
		if !validRingSize(num) {
			return nil, fmt.Errorf("queue %d of %d entries; want a power of two from 2 to %d", index, num, maxRingSize)
		}
		q.num = uint16(num)
	case reqSetVringBase:
		if num > 0xffff {
			return nil, fmt.Errorf("queue %d at index %d; want 16 bits", index, num)
		}
		d.setBase(q, uint16(num))
	case reqGetVringBase:
		d.stopQueue(q)
		q.setKick(nil)
		answer := binary.NativeEndian.AppendUint32(nil, index)
		return binary.NativeEndian.AppendUint32(answer, uint32(q.base)), nil
	default: // reqSetVringEnable
		if q.enabled = num != 0; !q.enabled {
			d.stopQueue(q)
		}
	}
	return nil, d.startQueue(q)
}

// setBase notes where a ring starts. One that does not go on where it was
// stopped belongs to another driver: the guest has rebooted, and its streams
// are gone. A paused machine goes on with them.
func (d *User) setBase(q *queue, base uint16) {
	if base != q.base {
		d.log.Debug("vsock: the guest's driver has restarted", "queue", q.index)
		d.s.mu.Lock()
		d.s.restart()
		d.s.mu.Unlock()
	}
	q.base = base
}

// setVringAddr takes index, flags and the ring's addresses in QEMU; the log's
// address does not matter, since dirty logging was not offered.
func (d *User) setVringAddr(m *message) error {
	w, err := m.words(5)
	if err != nil {
		return err
	}
	q, err := d.stoppedQueue(binary.NativeEndian.Uint32(m.payload))
	if err != nil {
		return err
	}
	q.desc, q.used, q.avail, q.addressed = w[1], w[2], w[3], true
	return d.startQueue(q)
}

// setVringFile takes the eventfd of a ring.
func (d *User) setVringFile(m *message) error {
	w, err := m.words(1)
	if err != nil {
		return err
	}
	q, err := d.queue(uint32(w[0] & 0xff))
	if err != nil {
		return err
	}
	if w[0]&vringNoFD != 0 {
		if m.req == reqSetVringKick {
			return fmt.Errorf("queue %d without kick; polling is not supported", q.index)
		}
		if m.req == reqSetVringCall {
			d.setCall(q, nil)
		}
		return nil
	}
	fd, err := m.takeFD()
	if err != nil {
		return err
	}
	f, err := eventFile(fd, "vring")
	if err != nil {
		return err
	}
	switch m.req {
	case reqSetVringCall:
		d.setCall(q, f)
		return nil
	case reqSetVringErr: // a broken ring ends the device, which says more
		return f.Close()
	}
	d.stopQueue(q)
	q.setKick(f)
	return d.startQueue(q)
}
