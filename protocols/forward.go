// SPDX-License-Identifier: Apache-2.0

package protocols

import (
	"encoding/binary"
	"fmt"
)

// ForwardHeaderSize is what the host writes before anything else to a connection
// to ForwardPort, in bytes.
const ForwardHeaderSize = 6

// forwardMagic opens the header.
const forwardMagic = "KFWD"

// MaxForwards is the most forwarded connections that a guest carries at a time.
const MaxForwards = 64

// ForwardHeader asks for a connection to a TCP port of the guest's loopback.
func ForwardHeader(port uint16) []byte {
	return binary.LittleEndian.AppendUint16([]byte(forwardMagic), port)
}

// ParseForwardHeader reads what ForwardHeader made.
func ParseForwardHeader(b []byte) (port uint16, err error) {
	if len(b) != ForwardHeaderSize || string(b[:4]) != forwardMagic {
		return 0, fmt.Errorf("forward header %q: want %q and a port in 2 bytes", b, forwardMagic)
	}
	if port = binary.LittleEndian.Uint16(b[4:]); port == 0 {
		return 0, fmt.Errorf("forward header: port 0 cannot be connected to")
	}
	return port, nil
}
