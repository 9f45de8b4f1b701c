// SPDX-License-Identifier: Apache-2.0

package hypervisortest

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/internal/spawn"
)

// fakePlugs are the devices that a fake machine was given while it runs.
type fakePlugs struct {
	mu      sync.Mutex
	ports   int
	nics    []hypervisor.NIC // guarded by mu; ID empty for a free port
	shares  []string         // guarded by mu; tags
	private bool
}

// PlugNIC implements hypervisor.NICPlugger; the device's files stay open until it is unplugged.
func (vm *FakeVM) PlugNIC(ctx context.Context, n hypervisor.NIC) (string, error) {
	p := &vm.plugs
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := ctx.Err(); err != nil || len(n.Taps) == 0 {
		n.Close()
		return "", fmt.Errorf("plug NIC %s of %d taps: %w", n.ID, len(n.Taps), err)
	}
	for i, have := range p.nics {
		if have.ID == "" {
			p.nics[i] = n
			return fakePlace(i), nil
		}
	}
	if len(p.nics) == p.ports {
		n.Close()
		return "", fmt.Errorf("all %d ports are in use", p.ports)
	}
	p.nics = append(p.nics, n)
	return fakePlace(len(p.nics) - 1), nil
}

func fakePlace(port int) string { return fmt.Sprintf("%02x/00", port+1) }

// UnplugNIC implements hypervisor.NICPlugger.
func (vm *FakeVM) UnplugNIC(_ context.Context, id string) error {
	vm.plugs.unplug(func(n hypervisor.NIC) bool { return n.ID == id })
	return nil
}

func (p *fakePlugs) unplug(which func(hypervisor.NIC) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, n := range p.nics {
		if which(n) {
			n.Close()
			p.nics[i] = hypervisor.NIC{}
		}
	}
}

// NICs are the IDs of the devices that are plugged in.
func (vm *FakeVM) NICs() []string {
	vm.plugs.mu.Lock()
	defer vm.plugs.mu.Unlock()
	var out []string
	for _, n := range vm.plugs.nics {
		if n.ID != "" {
			out = append(out, n.ID)
		}
	}
	return out
}

// nic makes a device with queues of a tap in a network namespace of its own,
// which ends with them.
func (s *suite) nic(id string, queues int) hypervisor.NIC {
	s.Helper()
	n := hypervisor.NIC{ID: id, MAC: net.HardwareAddr{2, 0, 0, 0, 0, byte(len(id))}}
	t := spawn.NewThread()
	defer t.Close()
	s.must(t.EnterNetNS(""))
	s.must(t.Do(func() error {
		for range queues {
			fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			n.Taps = append(n.Taps, os.NewFile(uintptr(fd), "tap"))
			req, err := unix.NewIfreq("test0")
			if err != nil {
				return err
			}
			flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
			if queues > 1 {
				flags |= unix.IFF_MULTI_QUEUE
			}
			req.SetUint16(flags)
			if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
				return fmt.Errorf("TUNSETIFF: %w", err)
			}
		}
		return nil
	}))
	return n
}

// plugging is what is expected of a machine that takes network devices while it runs.
func (s *suite) plugging(vm hypervisor.VM) {
	p, ok := vm.(hypervisor.NICPlugger)
	if !ok {
		return
	}
	s.must(p.UnplugNIC(s.context(), "none"))
	if s.NoHotplug {
		if _, err := p.PlugNIC(s.context(), s.nic("plug1", 1)); err == nil {
			s.Error("a device was plugged into a machine that takes none")
		}
		return
	}
	place, err := p.PlugNIC(s.context(), s.nic("plug1", 1))
	s.must(err)
	if _, err := p.PlugNIC(s.context(), s.nic("plug22", 1)); err == nil {
		s.Error("a second device was plugged into a machine with one port")
	}
	s.must(p.UnplugNIC(s.context(), "plug1"))
	again, err := p.PlugNIC(s.context(), s.nic("plug333", 2))
	s.must(err)
	if place == "" || again != place {
		s.Errorf("the devices were at %q and %q; want the same place", place, again)
	}
	s.must(p.UnplugNIC(s.context(), "plug333"))
	s.must(p.UnplugNIC(s.context(), "plug333")) // again
	if _, err := p.PlugNIC(s.context(), hypervisor.NIC{ID: "notaps", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 9}}); err == nil {
		s.Error("a device without taps was plugged")
	}
}

// PlugShare implements hypervisor.SharePlugger; the connection is closed at once.
func (vm *FakeVM) PlugShare(ctx context.Context, s hypervisor.Share) error {
	defer s.Conn.Close()
	p := &vm.plugs
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := ctx.Err(); err != nil || p.private || slices.Contains(p.shares, s.Tag) {
		return fmt.Errorf("plug share %s into a machine with %q (private: %v): %w", s.Tag, p.shares, p.private, err)
	}
	p.shares = append(p.shares, s.Tag)
	return nil
}

// Shares are the tags of the shares that were plugged in.
func (vm *FakeVM) Shares() []string {
	vm.plugs.mu.Lock()
	defer vm.plugs.mu.Unlock()
	return slices.Clone(vm.plugs.shares)
}
