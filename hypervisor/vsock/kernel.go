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
	for range cidTries {
		// 0 to 2 are reserved, and so is the largest number (virtio 1.3 §5.10.4).
		cid := uint64(3 + rand.Uint32N(unix.VMADDR_CID_ANY-3))
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), setGuestCID, uintptr(unsafe.Pointer(&cid)))
		if errno == 0 {
			return &Kernel{cid: uint32(cid), file: f, open: map[closer]struct{}{}}, nil
		}
		if errno != unix.EADDRINUSE {
			_ = f.Close()
			return nil, fmt.Errorf("vhost-vsock: reserve context id %d: %w", cid, errno)
		}
	}
	_ = f.Close()
	return nil, fmt.Errorf("vhost-vsock: %d random context ids were all in use", cidTries)
}

// VhostFile is the device file that QEMU inherits. It stays open here until Close.
func (k *Kernel) VhostFile() *os.File { return k.file }

// GuestCID is the reserved context id.
func (k *Kernel) GuestCID() uint32 { return k.cid }

// Dial implements Device. The kernel has no event for "the guest's driver is
// up", so that the wait for it has to try again:
//
//   - ENODEV: QEMU has not set the device up; at once, hence with back-off.
//   - ETIMEDOUT, EHOSTUNREACH: set up, but no driver took the request.
//   - ECONNRESET: the guest has answered that nobody listens: ECONNREFUSED here.
func (k *Kernel) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	remote := Addr{CID: k.cid, Port: port}
	wait := firstWait
	for {
		c, err := mdvsock.DialContext(ctx, k.cid, port, nil)
		if err == nil {
			return k.wrap(c, remote)
		}
		if errors.Is(err, unix.ECONNRESET) {
			err = os.NewSyscallError("connect", unix.ECONNREFUSED)
		} else if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ETIMEDOUT) || errors.Is(err, unix.EHOSTUNREACH) {
			if k.pause(ctx, wait) {
				wait = min(2*wait, longestWait)
				continue
			}
		}
		if k.isClosed() {
			err = net.ErrClosed
		} else if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, &net.OpError{Op: "dial", Net: "vsock", Addr: remote, Err: err}
	}
}

// pause waits for d; false when ctx is done or the device closed.
func (k *Kernel) pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return !k.isClosed()
	case <-ctx.Done():
		return false
	}
}

func (k *Kernel) isClosed() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.open == nil
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
}

func (c *kernelConn) LocalAddr() net.Addr  { return c.local }
func (c *kernelConn) RemoteAddr() net.Addr { return c.remote }

func (c *kernelConn) Close() error {
	c.k.untrack(c)
	return c.Conn.Close()
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
			return nil, err
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
