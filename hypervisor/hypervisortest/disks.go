// SPDX-License-Identifier: Apache-2.0

package hypervisortest

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/kata-v2/kata/hypervisor"
)

// fakeDisks are the disks that a fake machine has, in its ports.
type fakeDisks struct {
	mu    sync.Mutex
	ports []string // guarded by mu; ID, empty for a free port
}

// fakeDiskPlace is where the guest finds the disk in a port.
func fakeDiskPlace(port int) string { return fmt.Sprintf("%02x/00", 0x80+port) }

// boot takes the disks of a machine that starts, whose files it closes, and
// returns their places.
func (f *fakeDisks) boot(c hypervisor.Config) (places []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ports = make([]string, c.HotplugPorts+len(c.Disks))
	for i, d := range c.Disks {
		d.Close()
		f.ports[i] = d.ID
		places = append(places, fakeDiskPlace(i))
	}
	return places
}

// PlugDisk implements hypervisor.DiskPlugger.
func (vm *FakeVM) PlugDisk(ctx context.Context, d hypervisor.Disk) (string, error) {
	defer d.Close()
	f := &vm.disks
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.Index(f.ports, "")
	switch {
	case ctx.Err() != nil:
		return "", fmt.Errorf("plug disk %s: %w", d.ID, ctx.Err())
	case d.ID == "" || len(d.Parts) == 0 || len(d.Parts) > 1 && !d.ReadOnly || slices.Contains(f.ports, d.ID):
		return "", fmt.Errorf("plug disk %q of %d parts: refused", d.ID, len(d.Parts))
	case i < 0:
		return "", fmt.Errorf("all %d ports are in use", len(f.ports))
	}
	f.ports[i] = d.ID
	return fakeDiskPlace(i), nil
}

// UnplugDisk implements hypervisor.DiskPlugger.
func (vm *FakeVM) UnplugDisk(ctx context.Context, id string) error {
	f := &vm.disks
	f.mu.Lock()
	defer f.mu.Unlock()
	if i := slices.Index(f.ports, id); i >= 0 {
		f.ports[i] = ""
	}
	return ctx.Err()
}

// ResizeDisk implements hypervisor.DiskResizer.
func (vm *FakeVM) ResizeDisk(ctx context.Context, id string, _ uint64) error {
	f := &vm.disks
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.Contains(f.ports, id) {
		return fmt.Errorf("resize disk %s: there is none", id)
	}
	return ctx.Err()
}

// Disks are the IDs of the machine's disks, as text with a blank between them.
func (vm *FakeVM) Disks() string {
	vm.disks.mu.Lock()
	defer vm.disks.mu.Unlock()
	return strings.Join(slices.DeleteFunc(slices.Clone(vm.disks.ports), func(id string) bool { return id == "" }), " ")
}
