// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The few rtnetlink messages that the agent needs (rtnetlink(7), netlink(7)),
// instead of a library that is larger than the rest of the agent's own code.

var native = binary.NativeEndian

// conn is one rtnetlink socket. It is not safe for concurrent use.
type conn struct {
	fd  int
	seq uint32
}

func open() (*conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("rtnetlink: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("rtnetlink: bind: %w", err)
	}
	return &conn{fd: fd}, nil
}

func (c *conn) close() { unix.Close(c.fd) }

// message is one answer: its type and what follows the netlink header.
type message struct {
	kind uint16
	body []byte
}

// do sends a request and collects its answers up to the acknowledgement or, of a
// dump, its end.
func (c *conn) do(kind, flags uint16, body []byte) ([]message, error) {
	c.seq++
	flags |= unix.NLM_F_REQUEST
	// The bits of NLM_F_DUMP mean REPLACE and EXCL in a request that makes something.
	if flags&unix.NLM_F_DUMP != unix.NLM_F_DUMP {
		flags |= unix.NLM_F_ACK
	}
	req := native.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(body)))
	req = native.AppendUint16(req, kind)
	req = native.AppendUint16(req, flags)
	req = native.AppendUint32(req, c.seq)
	req = native.AppendUint32(req, 0)
	if err := unix.Sendto(c.fd, append(req, body...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, fmt.Errorf("rtnetlink: send: %w", err)
	}
	var out []message
	buf := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(c.fd, buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("rtnetlink: receive: %w", err)
		}
		done, err := c.collect(buf[:n], &out)
		if err != nil || done {
			return out, err
		}
	}
}

func (c *conn) collect(b []byte, out *[]message) (done bool, err error) {
	for len(b) >= unix.NLMSG_HDRLEN {
		size := int(native.Uint32(b))
		if size < unix.NLMSG_HDRLEN || size > len(b) {
			return true, fmt.Errorf("rtnetlink: message of %d bytes in %d", size, len(b))
		}
		kind, seq, body := native.Uint16(b[4:]), native.Uint32(b[8:]), b[unix.NLMSG_HDRLEN:size]
		b = b[min(align(size), len(b)):]
		if seq != c.seq {
			continue
		}
		switch kind {
		case unix.NLMSG_DONE:
			return true, nil
		case unix.NLMSG_ERROR:
			if len(body) < 4 {
				return true, fmt.Errorf("rtnetlink: short error message")
			}
			if code := int32(native.Uint32(body)); code != 0 {
				return true, unix.Errno(-code)
			}
			return true, nil
		default:
			*out = append(*out, message{kind: kind, body: append([]byte(nil), body...)})
		}
	}
	return false, nil
}

func align(n int) int { return (n + 3) &^ 3 }

// attr appends an attribute (struct rtattr).
func attr(b []byte, kind uint16, val []byte) []byte {
	b = native.AppendUint16(b, uint16(4+len(val)))
	b = native.AppendUint16(b, kind)
	b = append(b, val...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func u32(v uint32) []byte { return native.AppendUint32(nil, v) }

// attrs reads the attributes that follow a fixed header of skip bytes.
func attrs(body []byte, skip int) map[uint16][]byte {
	out := map[uint16][]byte{}
	if len(body) < skip {
		return out
	}
	for b := body[skip:]; len(b) >= 4; {
		size := int(native.Uint16(b))
		if size < 4 || size > len(b) {
			break
		}
		// The upper bits of the type are flags (NLA_F_NESTED, NLA_F_NET_BYTEORDER).
		out[native.Uint16(b[2:])&0x3fff] = b[4:size]
		b = b[min(align(size), len(b)):]
	}
	return out
}

// waitLink calls look, and again whenever a link changes, until it is true.
func waitLink(ctx context.Context, timeout time.Duration, look func() (bool, error)) (bool, error) {
	if ok, err := look(); ok || err != nil {
		return ok, err
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return false, fmt.Errorf("rtnetlink: %w", err)
	}
	f := os.NewFile(uintptr(fd), "rtnetlink")
	defer f.Close()
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (unix.RTNLGRP_LINK - 1)}); err != nil {
		return false, fmt.Errorf("rtnetlink: bind: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, 16<<10)
	for {
		if ok, err := look(); ok || err != nil {
			return ok, err
		}
		// An overrun (ENOBUFS) is news as well.
		if _, err := f.Read(buf); err != nil && ctx.Err() != nil {
			return false, nil
		}
	}
}
