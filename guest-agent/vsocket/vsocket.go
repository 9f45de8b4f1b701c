// SPDX-License-Identifier: Apache-2.0

// Package vsocket is AF_VSOCK as net.Conn and net.Listener, as little of it as
// a guest needs. Descriptors sit in the runtime's poller, so an idle connection
// costs no thread.
package vsocket

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// HostCID is the host's context id (virtio 1.3 §5.10.4).
const HostCID = unix.VMADDR_CID_HOST

// AnyCID binds to whatever context id the guest has, -1 in address strings.
const AnyCID = unix.VMADDR_CID_ANY

const backlog = 128

// Addr is one end of a vsock connection.
type Addr struct{ CID, Port uint32 }

// Network is "vsock".
func (Addr) Network() string { return "vsock" }

// String is "vsock://cid:port".
func (a Addr) String() string { return fmt.Sprintf("vsock://%d:%d", a.CID, a.Port) }

// Conn is a stream connection. It can be half-closed.
type Conn struct {
	*os.File
	local, remote Addr
}

var _ net.Conn = (*Conn)(nil)

// LocalAddr is an Addr.
func (c *Conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr is an Addr; its port is the peer's source port.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline bounds reads and writes.
func (c *Conn) SetDeadline(t time.Time) error { return c.File.SetDeadline(t) }

// CloseWrite ends the outgoing direction; the peer reads EOF.
func (c *Conn) CloseWrite() error { return c.shutdown(unix.SHUT_WR) }

func (c *Conn) shutdown(how int) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := rc.Control(func(fd uintptr) { serr = unix.Shutdown(int(fd), how) }); err != nil {
		return err
	}
	return opError("shutdown", c.remote, serr)
}

// Listener accepts connections to one port.
type Listener struct {
	f    *os.File
	addr Addr
}

var _ net.Listener = (*Listener)(nil)

// Listen listens on port at the context id cid (AnyCID for the guest's own).
func Listen(cid, port uint32) (*Listener, error) {
	a := Addr{CID: cid, Port: port}
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, opError("listen", a, err)
	}
	if err := unix.Bind(fd, &unix.SockaddrVM{CID: cid, Port: port}); err != nil {
		unix.Close(fd)
		return nil, opError("bind", a, err)
	}
	if err := unix.Listen(fd, backlog); err != nil {
		unix.Close(fd)
		return nil, opError("listen", a, err)
	}
	return &Listener{f: os.NewFile(uintptr(fd), a.String()), addr: a}, nil
}

// Accept waits for a connection; after Close it returns net.ErrClosed.
func (l *Listener) Accept() (net.Conn, error) {
	rc, err := l.f.SyscallConn()
	if err != nil {
		return nil, opError("accept", l.addr, err)
	}
	var nfd int
	var sa unix.Sockaddr
	var aerr error
	err = rc.Read(func(fd uintptr) bool {
		for {
			nfd, sa, aerr = unix.Accept4(int(fd), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			switch aerr {
			case unix.EINTR, unix.ECONNABORTED:
				// ECONNABORTED: the peer gave up while it was queued.
				continue
			case unix.EAGAIN:
				return false
			}
			return true
		}
	})
	if err == nil {
		err = aerr
	}
	if err != nil {
		return nil, opError("accept", l.addr, err)
	}
	return newConn(nfd, l.addr, sa), nil
}

// Close stops accepting; a blocked Accept returns.
func (l *Listener) Close() error { return l.f.Close() }

// Addr is the bound address.
func (l *Listener) Addr() net.Addr { return l.addr }

// Dial connects to port of cid; it blocks no longer than timeout.
func Dial(cid, port uint32, timeout time.Duration) (*Conn, error) {
	a := Addr{CID: cid, Port: port}
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, opError("dial", a, err)
	}
	// A blocking connect with the family's own timeout: the socket becomes
	// non-blocking only afterwards, when it enters the poller.
	tv := unix.NsecToTimeval(timeout.Nanoseconds())
	err = unix.SetsockoptTimeval(fd, unix.AF_VSOCK, unix.SO_VM_SOCKETS_CONNECT_TIMEOUT, &tv)
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrVM{CID: cid, Port: port})
	}
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		unix.Close(fd)
		return nil, opError("dial", a, err)
	}
	return newConn(fd, Addr{}, &unix.SockaddrVM{CID: cid, Port: port}), nil
}

func newConn(fd int, local Addr, peer unix.Sockaddr) *Conn {
	if sa, err := unix.Getsockname(fd); err == nil {
		if vm, ok := sa.(*unix.SockaddrVM); ok {
			local = Addr{CID: vm.CID, Port: vm.Port}
		}
	}
	var remote Addr
	if vm, ok := peer.(*unix.SockaddrVM); ok {
		remote = Addr{CID: vm.CID, Port: vm.Port}
	}
	return &Conn{File: os.NewFile(uintptr(fd), remote.String()), local: local, remote: remote}
}

func opError(op string, a Addr, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, os.ErrClosed) {
		err = net.ErrClosed
	}
	return &net.OpError{Op: op, Net: "vsock", Addr: a, Err: err}
}
