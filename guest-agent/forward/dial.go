// SPDX-License-Identifier: Apache-2.0

package forward

import (
	"os"

	"golang.org/x/sys/unix"
)

// conn is a connection to a server in the guest. The dialer of package net would
// do, and make the agent a third of a MiB larger with its resolver.
type conn struct{ *os.File }

// CloseWrite ends the outgoing direction.
func (c conn) CloseWrite() error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := rc.Control(func(fd uintptr) { serr = unix.Shutdown(int(fd), unix.SHUT_WR) }); err != nil {
		return err
	}
	return os.NewSyscallError("shutdown", serr)
}

// dial connects to a server on either loopback address, IPv4's first, as the
// host's side does without a machine.
func dial(port uint16) (conn, error) {
	c, err := connect(unix.AF_INET, &unix.SockaddrInet4{Port: int(port), Addr: [4]byte{127, 0, 0, 1}})
	if err != nil {
		if c6, err6 := connect(unix.AF_INET6, &unix.SockaddrInet6{Port: int(port), Addr: [16]byte{15: 1}}); err6 == nil {
			return c6, nil
		}
	}
	return c, err // IPv4's own reason: without IPv6 the other says nothing
}

// connect blocks no longer than beginTimeout: the other end is this kernel's, and
// only a server that is behind with accepting lets one wait.
func connect(family int, to unix.Sockaddr) (conn, error) {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return conn{}, os.NewSyscallError("socket", err)
	}
	tv := unix.NsecToTimeval(beginTimeout.Nanoseconds())
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	if err == nil {
		err = unix.Connect(fd, to)
		for err == unix.EINTR {
			err = unix.Connect(fd, to) // waits on; it does not begin again
		}
	}
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		unix.Close(fd)
		return conn{}, os.NewSyscallError("connect", err)
	}
	return conn{os.NewFile(uintptr(fd), "forward")}, nil
}
