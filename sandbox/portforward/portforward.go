// SPDX-License-Identifier: Apache-2.0

package portforward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/internal/relay"
	"github.com/kata-v2/kata/internal/spawn"
	"github.com/kata-v2/kata/protocols"
)

// beginTimeout bounds the way to the port in the guest.
const beginTimeout = 15 * time.Second

// Options describe where connections go.
type Options struct {
	// Dial connects to a vsock port of the guest.
	Dial func(ctx context.Context, port uint32) (net.Conn, error)
	// Log gets one line per connection, and per refused one.
	Log *slog.Logger
}

// Forwarder takes connections to the loopback of one network namespace.
type Forwarder struct {
	o         Options
	link      *os.File
	listeners []*net.TCPListener
}

// Open begins to take connections to the loopback of the namespace bound at
// path; they queue until Serve. An error means that this kernel cannot do it, or
// that there is no such namespace; nothing is left then.
func Open(path string, o Options) (*Forwarder, error) {
	f := &Forwarder{o: o}
	if err := f.open(path); err != nil {
		return nil, errors.Join(fmt.Errorf("forward ports of network namespace %s: %w", path, err), f.Close())
	}
	return f, nil
}

func (f *Forwarder) open(path string) error {
	ns, err := os.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	v4, err := f.listen(path, "tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	v6, err := f.listen(path, "tcp6", "[::1]:0")
	if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) && !errors.Is(err, unix.EAFNOSUPPORT) {
		return err // else the namespace has no IPv6
	}
	f.link, err = steer(ns, v4, v6)
	return err
}

// listen opens a listener in the namespace. Its port is of no account.
func (f *Forwarder) listen(path, network, address string) (*net.TCPListener, error) {
	t := spawn.NewThread()
	defer t.Close()
	if err := t.EnterNetNS(path); err != nil {
		return nil, err
	}
	var l net.Listener
	err := t.Do(func() (err error) {
		var c net.ListenConfig
		c.SetMultipathTCP(false) // the kernel's map takes plain TCP only
		l, err = c.Listen(context.Background(), network, address)
		return err
	})
	if err != nil {
		return nil, err
	}
	f.listeners = append(f.listeners, l.(*net.TCPListener))
	return l.(*net.TCPListener), nil
}

// Close takes no more connections and leaves the namespace as it was. Those that
// Serve carries go on.
func (f *Forwarder) Close() error {
	var errs []error
	if f.link != nil {
		errs = append(errs, f.link.Close())
	}
	for _, l := range f.listeners {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// Serve carries connections until ctx is done and all of them have ended, and
// closes f. It is called once.
func (f *Forwarder) Serve(ctx context.Context) {
	defer context.AfterFunc(ctx, func() { f.Close() })()
	var wg sync.WaitGroup
	defer wg.Wait() // before the line above is undone
	places := make(chan struct{}, protocols.MaxForwards)
	for _, l := range f.listeners {
		wg.Go(func() {
			for {
				c, err := l.AcceptTCP()
				if err != nil {
					if ctx.Err() == nil {
						f.o.Log.Error("port forward ended", "error", err)
					}
					return
				}
				select {
				case places <- struct{}{}:
					wg.Go(func() { defer func() { <-places }(); f.forward(ctx, c) })
				default:
					f.refuse(c, fmt.Errorf("%d connections are open, and no more at a time", protocols.MaxForwards))
				}
			}
		})
	}
}

// forward owns c.
func (f *Forwarder) forward(ctx context.Context, c *net.TCPConn) {
	guest, err := f.begin(ctx, port(c))
	if err != nil {
		f.refuse(c, err)
		return
	}
	f.o.Log.Debug("port forward", "port", port(c))
	relay.Join(ctx, c, guest)
}

// port is what the client connected to.
func port(c *net.TCPConn) uint16 { return uint16(c.LocalAddr().(*net.TCPAddr).Port) }

// refuse resets a connection. The client's connect has succeeded by now, so this
// is what is left of a refusal.
func (f *Forwarder) refuse(c *net.TCPConn, err error) {
	f.o.Log.Warn("port forward refused", "port", port(c), "error", err)
	c.SetLinger(0)
	c.Close()
}

// begin reaches the port in the guest.
func (f *Forwarder) begin(ctx context.Context, port uint16) (net.Conn, error) {
	dctx, cancel := context.WithTimeout(ctx, beginTimeout)
	defer cancel()
	g, err := f.o.Dial(dctx, protocols.ForwardPort)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("the guest's agent forwards no ports (it lacks the feature %q): %w", protocols.FeatureTCPForward, err)
	}
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(dctx, func() { g.Close() })
	err = ask(g, port)
	if !stop() && err == nil {
		err = dctx.Err()
	}
	if err != nil {
		g.Close()
		return nil, err
	}
	return g, nil
}

// ask names the port and reads the answer.
func ask(g net.Conn, port uint16) error {
	if _, err := g.Write(protocols.ForwardHeader(port)); err != nil {
		return fmt.Errorf("ask the guest: %w", err)
	}
	var status [1]byte
	if _, err := io.ReadFull(g, status[:]); err != nil {
		return fmt.Errorf("the guest's answer: %w", err)
	}
	if status[0] != 0 {
		return fmt.Errorf("connect to the port in the guest: %w", syscall.Errno(status[0]))
	}
	return nil
}
