// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"sync"

	"golang.org/x/sys/unix"
)

// DefaultGuestCID is the guest's context id when none is configured. The
// numbers below are reserved; every VM has a device of its own, so that all of
// them may use the same one.
const DefaultGuestCID = 3

// UserConfig describes a User device.
type UserConfig struct {
	// GuestCID is the guest's context id; 0 means DefaultGuestCID.
	GuestCID uint64
	// HybridPath is where to serve outside tools ("CONNECT <port>\n"); empty for none.
	// Nothing may exist there; the socket is gone after Close. Its mode is 0600.
	HybridPath string
	// Logger gets one line per event; nil for slog.Default().
	Logger *slog.Logger
}

// User is a virtio-vsock device that runs in this process and serves QEMU as a
// vhost-user back-end over a connected socket. It is a Device.
//
// The machine's memory must be shared (memory-backend-memfd,share=on). QEMU
// gets the socket by its number: -chardev socket,id=vsock0,fd=N
// -device vhost-user-vsock-pci,chardev=vsock0.
type User struct {
	log  *slog.Logger
	cid  uint64
	ctl  *net.UnixConn
	qemu *os.File
	s    *stack

	flusher chan struct{} // asks for a flush by a goroutine with time
	stopped chan struct{} // closed when the device goes down
	done    chan struct{} // closed when nothing of it runs any more
	hybrid  *hybrid
	wg      sync.WaitGroup

	// Of the control goroutine alone.
	features, proto uint64

	// queues[i].ring and .call, mem and err are guarded by s.mu; the rest of a
	// queue is the control goroutine's.
	queues [numQueues]queue
	mem    memory
	err    error
}

var _ Device = (*User)(nil)

// NewUser makes a device and waits for QEMU to take its QEMUFile. Dial and
// Listen work at once.
func NewUser(cfg UserConfig) (*User, error) {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		return nil, errors.New("vhost-user vsock: virtqueues are little endian and so must this host be")
	}
	if cfg.GuestCID == 0 {
		cfg.GuestCID = DefaultGuestCID
	}
	if cfg.GuestCID < 3 || cfg.GuestCID >= unix.VMADDR_CID_ANY {
		return nil, fmt.Errorf("GuestCID %d: want 3 to %d", cfg.GuestCID, uint32(unix.VMADDR_CID_ANY-1))
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	d := &User{
		log: cfg.Logger, cid: cfg.GuestCID, s: newStack(cfg.GuestCID),
		flusher: make(chan struct{}, 1), stopped: make(chan struct{}), done: make(chan struct{}),
	}
	for i := range d.queues {
		d.queues[i].index = i
	}
	d.s.flush = d.flush
	var err error
	if d.ctl, d.qemu, err = socketPair(); err != nil {
		return nil, err
	}
	if cfg.HybridPath != "" {
		if d.hybrid, err = listenHybrid(cfg.HybridPath, d, d.log); err != nil {
			_ = d.ctl.Close()
			_ = d.qemu.Close()
			return nil, err
		}
	}
	d.wg.Go(d.flushLoop)
	go d.run()
	return d, nil
}

// socketPair returns our end and QEMU's.
func socketPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("vhost-user socket: %w", os.NewSyscallError("socketpair", err))
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "vhost-user"), os.NewFile(uintptr(fds[1]), "vhost-user-qemu")
	c, err := net.FileConn(ours) // a duplicate
	_ = ours.Close()
	if err != nil {
		_ = theirs.Close()
		return nil, nil, fmt.Errorf("vhost-user socket: %w", err)
	}
	return c.(*net.UnixConn), theirs, nil
}

// QEMUFile is the end of the control socket that QEMU inherits. The caller
// closes it once QEMU has started: while a copy is open here, the device does
// not notice QEMU's end. Close closes it as well.
func (d *User) QEMUFile() *os.File { return d.qemu }

// GuestCID is the guest's context id.
func (d *User) GuestCID() uint32 { return uint32(d.cid) }

// Dial implements Device.
func (d *User) Dial(ctx context.Context, port uint32) (net.Conn, error) { return d.s.dial(ctx, port) }

// Listen implements Device.
func (d *User) Listen(port uint32) (net.Listener, error) { return d.s.listen(port) }

// Done is closed when the device has ended: QEMU has gone, Close was called or
// the guest broke its rings.
func (d *User) Done() <-chan struct{} { return d.done }

// Err says what ended the device: nil before Done, after Close and when QEMU
// has gone in order.
func (d *User) Err() error {
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	return d.err
}

// Close implements Device. It returns when nothing of the device runs any more.
func (d *User) Close() error {
	d.s.mu.Lock()
	d.s.end(net.ErrClosed)
	d.s.mu.Unlock()
	_ = d.ctl.Close() // wakes the control goroutine; a second Close is harmless
	<-d.done
	return nil
}

// run is the control goroutine: it answers QEMU until either side ends, then
// takes everything down.
func (d *User) run() {
	err := d.serve()
	s := d.s
	s.mu.Lock()
	switch {
	case s.err != nil: // Close, or fail, which has noted why
	case err == nil:
		d.log.Debug("vsock: QEMU closed its end")
		s.end(unix.ECONNRESET)
	default:
		d.failLocked(err)
	}
	s.mu.Unlock()
	close(d.stopped)
	_ = d.ctl.Close()
	_ = d.qemu.Close()
	if d.hybrid != nil {
		d.hybrid.close()
	}
	for i := range d.queues {
		d.releaseQueue(&d.queues[i])
	}
	d.wg.Wait()
	s.mu.Lock()
	d.mem.unmap()
	d.mem = nil
	s.mu.Unlock()
	close(d.done)
}

// serve reads requests until QEMU closes its end.
func (d *User) serve() error {
	for {
		m, err := readMessage(d.ctl)
		if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
			return nil
		}
		if err != nil {
			return err
		}
		err = d.handle(m)
		m.close()
		if err != nil {
			return fmt.Errorf("vhost-user request %d: %w", m.req, err)
		}
	}
}

// failLocked ends the device because of err; s.mu is held. The control
// goroutine does the rest.
func (d *User) failLocked(err error) {
	if d.s.err != nil {
		return
	}
	d.err = fmt.Errorf("vsock device: %w", err)
	d.log.Error("vsock: device ended", "error", err)
	d.s.end(d.err)
	_ = d.ctl.Close()
}

// fault is what the runtime panics with for memory that has vanished, for
// instance because the VMM has truncated its memory file.
type fault interface {
	error
	Addr() uintptr
}

// guard runs f, which touches guest memory, and turns a fault into an error.
func guard(f func() error) (err error) {
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		if r := recover(); r != nil {
			flt, ok := r.(fault)
			if !ok {
				panic(r)
			}
			err = fmt.Errorf("guest memory: %w", flt)
		}
	}()
	return f()
}
