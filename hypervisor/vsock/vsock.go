// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"context"
	"fmt"
	"net"
)

// HostCID is the context id by which a guest names its host (virtio 1.3 §5.10.4).
const HostCID = 2

// Device is the host's end of one machine's vsock.
type Device interface {
	// Dial connects to a port of the guest. Before the guest's driver is up it
	// waits for it, bounded by ctx; a port without a listener is refused with
	// ECONNREFUSED. Errors are *net.OpError with Net "vsock".
	Dial(ctx context.Context, port uint32) (net.Conn, error)
	// Listen accepts connections of this machine's guest to a host port; 0
	// picks a free one. A port in use is EADDRINUSE.
	Listen(port uint32) (net.Listener, error)
	// Close ends the device: every connection fails, every listener closes.
	Close() error
}

// HalfCloser is implemented by every connection of a Device: CloseWrite ends
// one direction, the peer then reads EOF and may go on writing.
type HalfCloser interface {
	CloseWrite() error
}

// Addr is the net.Addr of a vsock endpoint.
type Addr struct {
	CID, Port uint32
}

// Network returns "vsock".
func (Addr) Network() string { return "vsock" }

// String is "vsock://cid:port".
func (a Addr) String() string { return fmt.Sprintf("vsock://%d:%d", a.CID, a.Port) }
