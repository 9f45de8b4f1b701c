// SPDX-License-Identifier: Apache-2.0

// Package forward connects the host to TCP ports of the guest's loopback
// (protocols.FeatureTCPForward).
package forward

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"syscall"
	"time"

	"github.com/kata-v2/kata/guest-agent/agentlog"
	"github.com/kata-v2/kata/guest-agent/vsocket"
	"github.com/kata-v2/kata/internal/relay"
	"github.com/kata-v2/kata/protocols"
)

// beginTimeout bounds what comes before the first byte: the header and the
// connection to the port.
const beginTimeout = 10 * time.Second

// Serve serves l until ctx is done and every connection has ended. It closes l.
func Serve(ctx context.Context, l net.Listener, log *slog.Logger) {
	slots := make(chan struct{}, protocols.MaxForwards)
	vsocket.Serve(ctx, l, func(c net.Conn) {
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
		default:
			answer(c, syscall.EAGAIN)
			c.Close()
			return
		}
		if err := serve(ctx, c); err != nil {
			log.Debug("forward", agentlog.KeyError, err.Error())
		}
	})
}

// serve owns c.
func serve(ctx context.Context, c net.Conn) error {
	target, err := begin(ctx, c)
	if err != nil {
		c.Close()
		return err
	}
	relay.Join(ctx, c, target)
	return nil
}

// begin reads the header, connects and answers.
func begin(ctx context.Context, c net.Conn) (target conn, err error) {
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if err := c.SetDeadline(time.Now().Add(beginTimeout)); err != nil {
		return target, err
	}
	var header [protocols.ForwardHeaderSize]byte
	if _, err := io.ReadFull(c, header[:]); err != nil {
		return target, err
	}
	port, err := protocols.ParseForwardHeader(header[:])
	if err != nil {
		answer(c, syscall.EPROTO)
		return target, err
	}
	target, err = dial(port)
	if err != nil {
		answer(c, errno(err))
		return target, err
	}
	if err = errors.Join(answer(c, 0), c.SetDeadline(time.Time{})); err != nil {
		target.Close()
	}
	return target, err
}

func answer(c net.Conn, e syscall.Errno) error {
	_, err := c.Write([]byte{byte(e)})
	return err
}

// errno is what an error says to the host; all of Linux's are below 256.
func errno(err error) syscall.Errno {
	var e syscall.Errno
	if errors.As(err, &e) && e != 0 && e < 256 {
		return e
	}
	return syscall.ETIMEDOUT
}
