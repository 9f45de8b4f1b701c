// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/internal/channel"
)

// Serial is a Device without vsock: its streams share one virtio-serial port
// (package channel). A machine that has it can be saved and restored, which one
// with User cannot. QEMU gets the socket by its number: -chardev
// socket,id=agent,fd=N -device virtserialport,chardev=agent,name=<channel.PortName>.
type Serial struct {
	mux      *channel.Mux
	line     *channel.Line
	qemu     *os.File
	restored bool
	scan     bool
	same     bool
	want     chan struct{} // closed when the guest shall go on
	wantOnce sync.Once
	ready    chan struct{} // closed when the guest serves
	hybrid   *hybrid
	wg       sync.WaitGroup
}

var _ Device = (*Serial)(nil)

// SerialConfig describes a Serial device.
type SerialConfig struct {
	// Restored says that the machine is: its guest goes on at once. That of another
	// one serves, and may be saved, until the first Dial.
	Restored bool
	// Scan tells the guest to look for devices (channel.Hello).
	Scan bool
	// Same tells a restored guest that it is the one that was saved (channel.Hello).
	Same bool
	// HybridPath is as UserConfig's.
	HybridPath string
	// Logger gets one line per event; nil for slog.Default().
	Logger *slog.Logger
}

// NewSerial makes a device and waits for QEMU to take its QEMUFile.
func NewSerial(cfg SerialConfig) (*Serial, error) {
	conn, qemu, err := socketPair()
	if err != nil {
		return nil, err
	}
	d := &Serial{
		line: channel.NewLine(conn), qemu: qemu, restored: cfg.Restored, scan: cfg.Scan, same: cfg.Same, want: make(chan struct{}), ready: make(chan struct{}),
		mux: channel.New(channel.Config{Host: true, Addr: func(peer bool, port uint32) net.Addr {
			if peer {
				return Addr{CID: DefaultGuestCID, Port: port}
			}
			return Addr{CID: HostCID, Port: port}
		}}),
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.HybridPath != "" {
		if d.hybrid, err = listenHybrid(cfg.HybridPath, d, cfg.Logger); err != nil {
			_ = conn.Close()
			_ = qemu.Close()
			return nil, err
		}
	}
	d.wg.Go(d.run)
	return d, nil
}

// run opens the channel.
func (d *Serial) run() {
	if err := d.open(); err != nil {
		d.mux.Fail(fmt.Errorf("%w: %w", unix.ECONNRESET, err))
		_ = d.line.Close()
	}
}

func (d *Serial) open() error {
	if !d.restored {
		if err := channel.ReadGreeting(d.line); err != nil {
			return err
		}
		close(d.ready)
		select {
		case <-d.want:
		case <-d.mux.Done():
			return net.ErrClosed
		}
	}
	hello := channel.NewHello(d.restored, d.scan)
	hello.Same = d.same
	if err := channel.SendHello(d.line, hello); err != nil {
		return err
	}
	if err := channel.ReadAck(d.line); err != nil {
		return err
	}
	if d.restored {
		close(d.ready)
	}
	return d.mux.Attach(d.line)
}

// Detach ends every stream and returns when the guest waits for a host again: then
// the machine may be saved. Dials wait until Resume.
func (d *Serial) Detach(ctx context.Context) error {
	if err := d.mux.Detach(ctx); err != nil {
		return err
	}
	return d.bounded(ctx, func() error { return channel.ReadGreeting(d.line) })
}

// Resume lets a guest go on after Detach, also one that has stood still meanwhile.
func (d *Serial) Resume(ctx context.Context) error {
	hello := channel.NewHello(true, false)
	hello.Same = true
	if err := channel.SendHello(d.line, hello); err != nil {
		return err
	}
	if err := d.bounded(ctx, func() error { return channel.ReadAck(d.line) }); err != nil {
		return err
	}
	return d.mux.Attach(d.line)
}

// bounded runs f, which reads of the line, until ctx is done.
func (d *Serial) bounded(ctx context.Context, f func() error) error {
	stop := context.AfterFunc(ctx, func() { _ = d.line.SetReadDeadline(time.Unix(1, 0)) })
	err := f()
	if !stop() {
		return fmt.Errorf("the guest does not answer: %w", context.Cause(ctx))
	}
	return err
}

// Ready is closed when the guest serves: one that is restored has then become
// another one than the guest that was saved.
func (d *Serial) Ready() <-chan struct{} { return d.ready }

// Done is closed when the device has ended.
func (d *Serial) Done() <-chan struct{} { return d.mux.Done() }

// Err says what ended the device; nil before Done.
func (d *Serial) Err() error { return d.mux.Err() }

// QEMUFile is the end of the port's socket that QEMU inherits. The caller closes it.
func (d *Serial) QEMUFile() *os.File { return d.qemu }

// Dial implements Device.
func (d *Serial) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	d.wantOnce.Do(func() { close(d.want) })
	return d.mux.Dial(ctx, port)
}

// Listen implements Device.
func (d *Serial) Listen(port uint32) (net.Listener, error) { return d.mux.Listen(port) }

// Close implements Device.
func (d *Serial) Close() error {
	if d.hybrid != nil {
		d.hybrid.close()
	}
	err := d.mux.Close()
	_ = d.line.Close()
	d.wg.Wait()
	return errors.Join(err, closeFile(d.qemu))
}

// closeFile closes a file that its other owner may have closed.
func closeFile(f *os.File) error {
	if err := f.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}
