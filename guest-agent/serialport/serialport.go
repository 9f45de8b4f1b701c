// SPDX-License-Identifier: Apache-2.0

// Package serialport is the guest's end of a channel over a virtio-serial port,
// for machines without vsock (package channel).
package serialport

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/vsocket"
	"github.com/kata-v2/kata/internal/channel"
)

// Port is the agent's port. Listeners that are made before Open accept from then on.
type Port struct{ mux *channel.Mux }

// New makes a port that is not open.
func New() *Port {
	return &Port{mux: channel.New(channel.Config{Addr: func(peer bool, port uint32) net.Addr {
		if peer {
			return vsocket.Addr{CID: vsocket.HostCID, Port: port}
		}
		return vsocket.Addr{CID: vsocket.AnyCID, Port: port}
	}})}
}

// Listen accepts streams of the host to a port.
func (p *Port) Listen(port uint32) (net.Listener, error) { return p.mux.Listen(port) }

// Finder finds the device node of a virtio-serial port by its name, waiting for it.
type Finder interface {
	SerialByName(ctx context.Context, name string) (string, error)
}

// Serve greets the host and waits for it, which may take as long as a saved
// machine lies about; obey is called with what the host says. When a host leaves in
// order, the next one is waited for. It returns an error when the port is of no
// use, and nil when ctx is done or the port was closed.
func (p *Port) Serve(ctx context.Context, f Finder, name string, obey func(channel.Hello) error) error {
	node, err := f.SerialByName(ctx, name)
	if err != nil {
		return err
	}
	file, err := os.OpenFile(node, os.O_RDWR|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return fmt.Errorf("channel: %w", err)
	}
	line := channel.NewLine(conn{file})
	stop := context.AfterFunc(ctx, func() { file.Close() })
	defer stop()
	for {
		if err = channel.Greet(line, obey); err != nil {
			break
		}
		if err = p.mux.Attach(line); err != nil {
			break
		}
		select {
		case <-p.mux.Detached():
		case <-p.mux.Done():
			return nil
		}
	}
	file.Close()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// conn makes a net.Conn of the port's file.
type conn struct{ *os.File }

func (c conn) LocalAddr() net.Addr                { return vsocket.Addr{CID: vsocket.AnyCID} }
func (c conn) RemoteAddr() net.Addr               { return vsocket.Addr{CID: vsocket.HostCID} }
func (c conn) SetDeadline(t time.Time) error      { return c.File.SetDeadline(t) }
func (c conn) SetReadDeadline(t time.Time) error  { return c.File.SetReadDeadline(t) }
func (c conn) SetWriteDeadline(t time.Time) error { return c.File.SetWriteDeadline(t) }

// Close ends the port and every stream.
func (p *Port) Close() error { return p.mux.Close() }
