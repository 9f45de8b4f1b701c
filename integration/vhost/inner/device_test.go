// SPDX-License-Identifier: Apache-2.0

package inner

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"testing"
	"time"
	"unsafe"

	mdvsock "github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/hypervisortest"
	"github.com/kata-v2/kata/hypervisor/hypervisortest/guestimage"
	"github.com/kata-v2/kata/hypervisor/qemu"
	"github.com/kata-v2/kata/hypervisor/vsock"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/guestsvc"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/measure"
)

// claim asks the kernel for one context id, as a shim beside this one would by
// chance, and gives it back.
func claim(t *testing.T, cid uint32) error {
	t.Helper()
	f, err := os.OpenFile("/dev/vhost-vsock", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	id := uint64(cid)
	const setGuestCID = 0x4008af60 // VHOST_VSOCK_SET_GUEST_CID (linux/vhost.h)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), setGuestCID, uintptr(unsafe.Pointer(&id))); errno != 0 {
		return errno
	}
	return nil
}

func newKernel(t *testing.T) *vsock.Kernel {
	t.Helper()
	k, err := vsock.NewKernel()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.Close() })
	return k
}

// contextIDs: the kernel gives an id to one device only, and free again when the device is gone.
func contextIDs(t *testing.T) {
	if !vsock.KernelAvailable() {
		t.Fatal("KernelAvailable is false")
	}
	k := newKernel(t)
	err := claim(t, k.GuestCID())
	if !errors.Is(err, unix.EADDRINUSE) {
		t.Fatalf("context id %d a second time: %v; want EADDRINUSE", k.GuestCID(), err)
	}
	t.Logf("context id %d a second time: %v", k.GuestCID(), err)
	seen := map[uint32]bool{k.GuestCID(): true}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			k := newKernel(t)
			mu.Lock()
			defer mu.Unlock()
			if seen[k.GuestCID()] {
				t.Errorf("context id %d was given twice", k.GuestCID())
			}
			seen[k.GuestCID()] = true
		})
	}
	wg.Wait()
	t.Logf("%d devices at once have %d context ids", 101, len(seen))
	if err := k.Close(); err != nil {
		t.Fatal(err)
	}
	if err := claim(t, k.GuestCID()); err != nil {
		t.Errorf("context id of a closed device: %v", err)
	}
}

// foreignPeer: a listener's port can be reached by everyone on this host; who is
// not the machine's guest is turned away.
func foreignPeer(t *testing.T) {
	k := newKernel(t)
	l, err := k.Listen(0)
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			_ = c.Close()
		}
		accepted <- err
	}()
	port := l.Addr().(vsock.Addr).Port
	for range 3 {
		c, err := mdvsock.Dial(mdvsock.Local, port, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.SetDeadline(time.Now().Add(stepTimeout)); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a stranger read %d, %v; want the end of its stream", n, err)
		}
		_ = c.Close()
	}
	select {
	case err := <-accepted:
		t.Fatalf("a stranger was accepted (%v)", err)
	default:
	}
	t.Logf("three streams from context id %d to port %d: none accepted", mdvsock.Local, port)
	dialled := make(chan error, 1)
	go func() { _, err := k.Dial(context.Background(), 1); dialled <- err }() // no machine is there
	if err := k.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-accepted; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
	if err := <-dialled; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Dial ended by Close: %v", err)
	}
}

func newQEMU() hypervisor.Hypervisor {
	return qemu.New(qemu.Options{Path: "/usr/bin/qemu-system-x86_64", Accelerator: qemu.TCG})
}

// testUser is an unprivileged user of no one's, as a pod's VMM has in production.
const testUser = 0x70ffffff

func guestConfig(t *testing.T) hypervisor.Config {
	return hypervisor.Config{
		Kernel: guestimage.Kernel(t), Initrd: GuestInitrd, CPUs: 1, MemoryBytes: 128 << 20,
		Vsock: hypervisor.VsockVhost, UID: testUser, GID: testUser,
	}
}

// conformance is the suite that every hypervisor passes.
func conformance(t *testing.T) {
	hypervisortest.Run(t, hypervisortest.Harness{
		Hypervisor: newQEMU(), Machine: guestConfig(t), Accelerator: qemu.TCG, SharedPorts: true, Timeout: stepTimeout,
	})
}

// vmDevice is a machine's vsock as a vsock.Device.
type vmDevice struct{ hypervisor.VM }

func (d vmDevice) Close() error { return d.Stop(context.Background()) }

// device runs the suite of vsock devices, and looks how fast the kernel's is.
func device(t *testing.T) {
	c := guestConfig(t)
	c.ID, c.Dir, c.ReadyParam = "device", t.TempDir(), guestsvc.ReadyParam
	ctx, cancel := context.WithTimeout(context.Background(), stepTimeout)
	defer cancel()
	begin := time.Now()
	vm, err := newQEMU().Start(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	d := vmDevice{vm}
	defer d.Close()
	if info := vm.Info(); info.Vsock != hypervisor.VsockVhost {
		t.Errorf("Info.Vsock is %q; want %q", info.Vsock, hypervisor.VsockVhost)
	}
	early, err := vm.Dial(ctx, guestsvc.EchoPort) // long before there is a driver
	if err != nil {
		t.Fatalf("%v; console:\n%s", err, vm.Info().ConsoleTail())
	}
	defer early.Close()
	t.Logf("a dial made before the guest was up answered after %v", time.Since(begin).Round(time.Millisecond))
	if err := vm.(hypervisor.ReadyWaiter).WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	cid := early.RemoteAddr().(vsock.Addr).CID
	if err := claim(t, cid); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("context id %d of a running machine: %v; want EADDRINUSE", cid, err)
	}
	vsocktest.Run(t, vsocktest.Config{Device: d, Bulk: 4 << 20, Streams: 200, Timeout: stepTimeout})
	t.Run("Figures", func(t *testing.T) { figures(t, d) })
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := claim(t, cid); err != nil {
		t.Errorf("context id %d of an ended machine: %v", cid, err)
	}
}

// figures prints what a stream costs here; they are no verdict.
func figures(t *testing.T, d vsock.Device) {
	const total, write = 16 << 20, 64 << 10
	ctx, cancel := context.WithTimeout(context.Background(), stepTimeout)
	defer cancel()
	up, err := measure.Up(ctx, d, total, write)
	if err != nil {
		t.Fatal(err)
	}
	down, err := measure.Down(ctx, d, total, write)
	if err != nil {
		t.Fatal(err)
	}
	trip, err := measure.RoundTrip(ctx, d, 101)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("guest to host %.1f MB/s, host to guest %.1f MB/s, round trip of 1 byte %v", up, down, trip.Round(time.Microsecond))
}
