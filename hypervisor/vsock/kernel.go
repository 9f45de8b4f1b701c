// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	mdvsock "github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

const (
	vhostPath = "/dev/vhost-vsock"
	// setGuestCID is VHOST_VSOCK_SET_GUEST_CID, _IOW(0xAF, 0x60, __u64)
	// (linux/vhost.h); the number is the same on every architecture of Linux that we build for.
	setGuestCID = 0x4008af60
	cidTries    = 64
	firstCID    = 3
	firstWait   = 5 * time.Millisecond
	longestWait = 200 * time.Millisecond
)

// KernelAvailable reports whether this process can use the kernel's vhost-vsock.
func KernelAvailable() bool {
	f, err := os.OpenFile(vhostPath, os.O_RDWR, 0)
	if err != nil {
		return false
	}
	_ = f.Close()
	return true
}

// Kernel is a vsock device of the kernel's vhost-vsock. It is a Device. QEMU gets
// it by -device vhost-vsock-pci,guest-cid=N,vhostfd=M.
type Kernel struct {
	cid  uint32
	file *os.File
	// life ends with Close, and with it every Dial that is under way.
	life context.Context
	end  context.CancelFunc

	mu   sync.Mutex
	open map[closer]struct{} // connections and listeners; nil after Close
}

type closer interface{ Close() error }

var _ Device = (*Kernel)(nil)

// NewKernel opens /dev/vhost-vsock and reserves a context id that no other
// machine of this host has. The reservation lasts while the file is open
// anywhere, that is until both Close and QEMU's end.
func NewKernel() (*Kernel, error) {
	f, err := os.OpenFile(vhostPath, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("vhost-vsock: %w", err)
	}
	cid, err := reserveCID(rand.Uint32N, func(cid uint64) error {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), setGuestCID, uintptr(unsafe.Pointer(&cid))); errno != 0 {
			return errno
		}
		return nil
	})
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("vhost-vsock: %w", err)
	}
	k := &Kernel{cid: cid, file: f, open: map[closer]struct{}{}}
	k.life, k.end = context.WithCancel(context.Background())
	return k, nil
}

// reserveCID draws context ids below a bound until set takes one. Shims do not
// know of each other: the kernel alone decides, with EADDRINUSE, who has an id.
func reserveCID(draw func(n uint32) uint32, set func(cid uint64) error) (uint32, error) {
	for range cidTries {
		// 0 to 2 are reserved, and so is the largest number (virtio 1.3 §5.10.4).
		cid := firstCID + draw(unix.VMADDR_CID_ANY-firstCID)
		err := set(uint64(cid))
		if err == nil {
			return cid, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return 0, fmt.Errorf("reserve context id %d: %w", cid, err)
		}
	}
	return 0, fmt.Errorf("%d random context ids were all in use", cidTries)
}

// VhostFile is the device file that QEMU inherits. It stays open here until Close.
func (k *Kernel) VhostFile() *os.File { return k.file }

// GuestCID is the reserved context id.
func (k *Kernel) GuestCID() uint32 { return k.cid }

// Dial implements Device. The kernel has no event for "the guest's driver is
// up", so that the wait for it has to try again:
//
//   - ETIMEDOUT: no driver took the request within the kernel's 2 s. While one
//     waits, the driver gets it as soon as it comes up.
//   - ENODEV, EHOSTUNREACH: kernels that do not let a request wait say so at once, hence the back-off.
//   - ECONNRESET: the guest has answered that nobody listens: ECONNREFUSED here.
func (k *Kernel) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	remote := Addr{CID: k.cid, Port: port}
	both, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(k.life, cancel)()
	for wait := firstWait; ; wait = min(2*wait, longestWait) {
		c, err := mdvsock.DialContext(both, k.cid, port, nil)
		if err == nil {
			return k.wrap(c, remote)
		}
		again := errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ETIMEDOUT) || errors.Is(err, unix.EHOSTUNREACH)
		if again && pause(both, wait) {
			continue
		}
		switch { // the device's own end resets a request as well
		case k.life.Err() != nil:
			err = net.ErrClosed
		case ctx.Err() != nil:
			err = ctx.Err()
		case errors.Is(err, unix.ECONNRESET):
			err = os.NewSyscallError("connect", unix.ECONNREFUSED)
		}
		return nil, &net.OpError{Op: "dial", Net: "vsock", Addr: remote, Err: err}
	}
}

// pause waits for d; false when ctx is done.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// track remembers c for Close; false if that has been called.
func (k *Kernel) track(c closer) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.open == nil {
		return false
	}
	k.open[c] = struct{}{}
	return true
}

func (k *Kernel) untrack(c closer) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.open, c)
}

func (k *Kernel) wrap(c *mdvsock.Conn, remote Addr) (net.Conn, error) {
	local := Addr{CID: HostCID}
	if a, ok := c.LocalAddr().(*mdvsock.Addr); ok {
		local.Port = a.Port
	}
	kc := &kernelConn{Conn: c, k: k, local: local, remote: remote}
	if !k.track(kc) {
		_ = c.Close()
		return nil, &net.OpError{Op: "dial", Net: "vsock", Addr: remote, Err: net.ErrClosed}
	}
	return kc, nil
}

// Listen implements Device. Host ports belong to all machines of the host: a
// port that another one's listener has is EADDRINUSE.
func (k *Kernel) Listen(port uint32) (net.Listener, error) {
	l, err := mdvsock.ListenContextID(unix.VMADDR_CID_ANY, port, nil)
	if err != nil {
		return nil, err
	}
	kl := &kernelListener{l: l, k: k}
	if !k.track(kl) {
		_ = l.Close()
		return nil, &net.OpError{Op: "listen", Net: "vsock", Addr: kl.Addr(), Err: net.ErrClosed}
	}
	return kl, nil
}

// Close implements Device.
func (k *Kernel) Close() error {
	k.mu.Lock()
	open := k.open
	k.open = nil
	k.mu.Unlock()
	if open == nil {
		return nil
	}
	k.end()
	for c := range open {
		_ = c.Close()
	}
	return k.file.Close()
}

// kernelConn is a kernel socket with the addresses of this package.
type kernelConn struct {
	*mdvsock.Conn
	k             *Kernel
	local, remote Addr
	closed        atomic.Bool
}

func (c *kernelConn) LocalAddr() net.Addr  { return c.local }
func (c *kernelConn) RemoteAddr() net.Addr { return c.remote }

// Close closes the stream; a second time it is net.ErrClosed, as with other connections.
func (c *kernelConn) Close() error {
	if c.closed.Swap(true) {
		return &net.OpError{Op: "close", Net: "vsock", Source: c.local, Addr: c.remote, Err: net.ErrClosed}
	}
	c.k.untrack(c)
	return c.Conn.Close()
}

// CloseWrite implements HalfCloser.
func (c *kernelConn) CloseWrite() error {
	return asClosed(c.Conn.CloseWrite(), "close-write", c.local, c.remote)
}

// asClosed makes net.ErrClosed of the error that the library has for some calls
// on a closed socket, EBADF, which it makes up itself.
func asClosed(err error, op string, local, remote net.Addr) error {
	if errors.Is(err, unix.EBADF) {
		return &net.OpError{Op: op, Net: "vsock", Source: local, Addr: remote, Err: net.ErrClosed}
	}
	return err
}

// kernelListener accepts from one guest only.
type kernelListener struct {
	l *mdvsock.Listener
	k *Kernel
}

// Accept returns the next stream of this machine's guest. Streams of other
// machines, which can reach the port as well, are closed.
func (l *kernelListener) Accept() (net.Conn, error) {
	for {
		c, err := l.l.Accept()
		if err != nil {
			return nil, asClosed(err, "accept", nil, l.Addr())
		}
		vc, ok := c.(*mdvsock.Conn)
		peer, isAddr := c.RemoteAddr().(*mdvsock.Addr)
		if !ok || !isAddr || peer.ContextID != l.k.cid {
			_ = c.Close()
			continue
		}
		return l.k.wrap(vc, Addr{CID: peer.ContextID, Port: peer.Port})
	}
}

func (l *kernelListener) Addr() net.Addr {
	a := Addr{CID: HostCID}
	if la, ok := l.l.Addr().(*mdvsock.Addr); ok {
		a.Port = la.Port
	}
	return a
}

func (l *kernelListener) Close() error {
	l.k.untrack(l)
	return l.l.Close()
}
