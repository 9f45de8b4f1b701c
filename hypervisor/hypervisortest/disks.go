// SPDX-License-Identifier: Apache-2.0

package hypervisortest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
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

// disk makes a disk of parts of a MiB each.
func (s *suite) disk(id string, parts int) hypervisor.Disk {
	s.Helper()
	d := hypervisor.Disk{ID: id, ReadOnly: parts > 1}
	for i := range parts {
		f, err := os.OpenFile(filepath.Join(s.TempDir(), fmt.Sprint(id, i)), os.O_RDWR|os.O_CREATE, 0o666)
		s.must(err)
		s.must(f.Truncate(1 << 20))
		if d.ReadOnly { // as whoever opens it for a read-only disk does
			ro, err := os.Open(f.Name())
			s.must(err)
			s.must(f.Close())
			f = ro
		}
		d.Parts = append(d.Parts, hypervisor.DiskPart{File: f, Sectors: 1 << 20 / hypervisor.SectorBytes})
	}
	return d
}

// disks is what is expected of a machine that takes disks while it runs.
func (s *suite) disks(vm hypervisor.VM) {
	p, ok := vm.(hypervisor.DiskPlugger)
	if !ok {
		return
	}
	s.must(p.UnplugDisk(s.context(), "none"))
	refused := func(why string, d hypervisor.Disk) {
		s.Helper()
		if _, err := p.PlugDisk(s.context(), d); err == nil {
			s.Errorf("%s was plugged", why)
		}
		for i, part := range d.Parts {
			if part.File.Close() == nil {
				s.Errorf("%s: file %d is open after the refusal", why, i)
			}
		}
	}
	if s.NoHotplug {
		refused("a disk for a machine that takes none", s.disk("disk1", 1))
		return
	}
	place, err := p.PlugDisk(s.context(), s.disk("disk1", 2))
	s.must(err)
	refused("a second disk for one port", s.disk("disk22", 1))
	s.must(p.UnplugDisk(s.context(), "disk1"))
	again, err := p.PlugDisk(s.context(), s.disk("disk1", 1))
	s.must(err)
	if place == "" || again != place {
		s.Errorf("the disks were at %q and %q; want the same place", place, again)
	}
	if r, ok := vm.(hypervisor.DiskResizer); ok {
		s.must(r.ResizeDisk(s.context(), "disk1", 2<<20))
		if err := r.ResizeDisk(s.context(), "none", 2<<20); err == nil {
			s.Error("a disk that is not there was resized")
		}
	}
	s.must(p.UnplugDisk(s.context(), "disk1"))
	s.must(p.UnplugDisk(s.context(), "disk1")) // again
	refused("a disk without parts", hypervisor.Disk{ID: "none"})
	several := s.disk("several", 2)
	several.ReadOnly = false
	refused("a disk of several parts that can be written", several)
	refused("a disk without an ID", s.disk("", 1))
}
