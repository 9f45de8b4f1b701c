// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"time"
)

// PortName is the name of the virtio-serial port.
const PortName = "kata.agent.0"

// Marks of the opening; eight bytes each.
const (
	greeting   = "KATAGST1"
	helloMagic = "KATAHST1"
	ack        = "KATAACK1"
)

// EntropySize is how many random bytes of the host a guest gets.
const EntropySize = 64

// HelloSize is the size of an encoded Hello in bytes: the mark, flags and a
// reserved word of 32 bits, nanoseconds since 1970 as 64 bits, little endian;
// then the entropy.
const HelloSize = 8 + 4 + 4 + 8 + EntropySize

const (
	flagRestored = 1 << iota
	flagScan
	flagSame
)

// Hello is what the host tells a guest first.
type Hello struct {
	// Restored says that the guest was saved and must become another one before
	// it serves: random numbers, identity, time, devices.
	Restored bool
	// Scan says that the machine has devices of which nothing else will tell the guest.
	Scan bool
	// Same says that a restored guest is the one that was saved, not a copy of it:
	// it keeps its identity.
	Same bool
	// Time of the host.
	Time time.Time
	// Entropy are random bytes that no other guest gets.
	Entropy [EntropySize]byte
}

// NewHello is a Hello of now with fresh entropy.
func NewHello(restored, scan bool) Hello {
	h := Hello{Restored: restored, Scan: scan, Time: time.Now()}
	rand.Read(h.Entropy[:]) //nolint:errcheck // it never fails
	return h
}

func (h Hello) encode() []byte {
	var flags uint32
	if h.Restored {
		flags |= flagRestored
	}
	if h.Scan {
		flags |= flagScan
	}
	if h.Same {
		flags |= flagSame
	}
	b := append(make([]byte, 0, HelloSize), helloMagic...)
	b = binary.LittleEndian.AppendUint32(b, flags)
	b = binary.LittleEndian.AppendUint32(b, 0)
	b = binary.LittleEndian.AppendUint64(b, uint64(h.Time.UnixNano()))
	return append(b, h.Entropy[:]...)
}

func decodeHello(b []byte) (h Hello, err error) {
	if len(b) != HelloSize || string(b[:8]) != helloMagic {
		return h, fmt.Errorf("channel: the host opens with %q: want %q", b[:min(8, len(b))], helloMagic)
	}
	flags := binary.LittleEndian.Uint32(b[8:])
	h.Restored, h.Scan, h.Same = flags&flagRestored != 0, flags&flagScan != 0, flags&flagSame != 0
	h.Time = time.Unix(0, int64(binary.LittleEndian.Uint64(b[16:])))
	copy(h.Entropy[:], b[24:])
	return h, nil
}

// Greet is the guest's part of the opening: it says that it serves, waits for
// the host, calls obey and answers. The wait may be long: a saved machine is in it.
func Greet(rw io.ReadWriter, obey func(Hello) error) error {
	if _, err := io.WriteString(rw, greeting); err != nil {
		return fmt.Errorf("channel: greet: %w", err)
	}
	var b [HelloSize]byte
	if _, err := io.ReadFull(rw, b[:]); err != nil {
		return fmt.Errorf("channel: wait for the host: %w", err)
	}
	h, err := decodeHello(b[:])
	if err != nil {
		return err
	}
	if err := obey(h); err != nil {
		return err
	}
	if _, err := io.WriteString(rw, ack); err != nil {
		return fmt.Errorf("channel: answer: %w", err)
	}
	return nil
}

// ReadGreeting waits until the guest serves.
func ReadGreeting(r io.Reader) error { return readMark(r, greeting) }

// SendHello tells the guest to go on. It does not wait.
func SendHello(w io.Writer, h Hello) error {
	if _, err := w.Write(h.encode()); err != nil {
		return fmt.Errorf("channel: hello: %w", err)
	}
	return nil
}

// ReadAck waits until the guest has done what Hello says.
func ReadAck(r io.Reader) error { return readMark(r, ack) }

func readMark(r io.Reader, want string) error {
	var b [8]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return fmt.Errorf("channel: wait for the guest: %w", err)
	}
	if string(b[:]) != want {
		return fmt.Errorf("channel: the guest says %q: want %q", b[:], want)
	}
	return nil
}
