// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/hypervisor"
)

// maxSerial is the longest serial number of a virtio-blk device (virtio 1.3
// §5.2.6, VIRTIO_BLK_T_GET_ID).
const maxSerial = 20

// diskFDs are the numbers of a disk's files in QEMU: of its parts, and of the
// descriptor that lists them when there are several.
type diskFDs struct {
	parts      []int
	descriptor int
}

// all are the numbers, in the order of the disk's sets.
func (l diskFDs) all() []int {
	if l.descriptor == 0 {
		return l.parts
	}
	return append(l.parts[:len(l.parts):len(l.parts)], l.descriptor)
}

// Sets of descriptors have numbers of the caller's choice. Those of the command
// line are the descriptors' own, those of plugged disks begin far above any.
const firstPluggedSet = 1 << 20

// setPath is how QEMU opens a file that it was handed as a member of a set (QEMU
// docs, qemu_open): its own user need not be able to open it by name.
func setPath(set int) string { return "/dev/fdset/" + strconv.Itoa(set) }

func checkDisks(disks []hypervisor.Disk) error {
	seen := map[string]bool{}
	for _, d := range disks {
		if err := checkDisk(d); err != nil {
			return err
		}
		if seen[d.ID] {
			return fmt.Errorf("disk %s: there are two of that ID", d.ID)
		}
		seen[d.ID] = true
	}
	return nil
}

func checkDisk(d hypervisor.Disk) error {
	switch {
	case !alphanumeric(d.ID) || len(d.ID) > maxSerial:
		return fmt.Errorf("disk ID %q: want at most %d letters and digits", d.ID, maxSerial)
	case len(d.Parts) == 0:
		return fmt.Errorf("disk %s: no parts", d.ID)
	case len(d.Parts) == 1:
		return nil
	case !d.ReadOnly:
		return fmt.Errorf("disk %s: %d parts: a disk of several must be read-only", d.ID, len(d.Parts))
	}
	for i, p := range d.Parts {
		st, err := p.File.Stat()
		switch {
		case err != nil:
			return fmt.Errorf("disk %s: part %d: %w", d.ID, i, err)
		case !st.Mode().IsRegular():
			return fmt.Errorf("disk %s: part %d (%s) is a %s: want regular files for a disk of several parts", d.ID, i, p.File.Name(), st.Mode().Type())
		case p.Sectors == 0:
			return fmt.Errorf("disk %s: part %d (%s) has no length", d.ID, i, p.File.Name())
		}
	}
	return nil
}

// diskPort is the root port of a disk that the machine has from the start: the one
// of its Place, else as many as come before it.
func diskPort(c hypervisor.Config, i int) int {
	if place := c.Disks[i].Place; place != "" {
		for port := range ports(c) {
			if portPlace(port) == place {
				return port
			}
		}
	}
	return i
}

// checkPlaces refuses disks that are not each in a port of its own.
func checkPlaces(c hypervisor.Config) error {
	in := map[int]string{}
	for i, d := range c.Disks {
		port := diskPort(c, i)
		if d.Place != "" && portPlace(port) != d.Place {
			return fmt.Errorf("disk %s: the machine has no place %s", d.ID, d.Place)
		}
		if other, taken := in[port]; taken {
			return fmt.Errorf("disk %s: disk %s is in its place %s", d.ID, other, portPlace(port))
		}
		in[port] = d.ID
	}
	return nil
}

// inheritDisks passes the disks' files on; they belong to the backend from now
// on, also when it fails.
func (s *start) inheritDisks() {
	for _, d := range s.c.Disks {
		var l diskFDs
		for _, p := range d.Parts {
			l.parts = append(l.parts, s.inherit.add(p.File))
		}
		s.l.Disks = append(s.l.Disks, l)
	}
}

// describeDisks makes the descriptors of disks of several parts.
func (s *start) describeDisks() error {
	for i, d := range s.c.Disks {
		if len(d.Parts) == 1 {
			continue
		}
		f, err := descriptor(d, s.l.Disks[i].parts)
		if err != nil {
			return err
		}
		s.l.Disks[i].descriptor = s.inherit.add(f)
	}
	for i, d := range s.c.Disks {
		s.vm.plugs.remember(d.ID, s.l.Disks[i].all())
	}
	return nil
}

// descriptor is a VMDK descriptor file that lists the parts as flat extents
// (VMware, Virtual Disk Format 5.0): the one way in which QEMU joins files without
// a copy. The extents say RW although the disk is read-only, since QEMU passes
// over those that say RDONLY and gives a disk of no sectors.
func descriptor(d hypervisor.Disk, sets []int) (*os.File, error) {
	var b strings.Builder
	b.WriteString("# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentFlat\"\n")
	for i, p := range d.Parts {
		fmt.Fprintf(&b, "RW %d FLAT \"%s\" 0\n", p.Sectors, setPath(sets[i]))
	}
	b.WriteString("ddb.virtualHWVersion = \"4\"\nddb.adapterType = \"ide\"\n")
	fd, err := unix.MemfdCreate("disk-"+d.ID, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("disk %s: descriptor: %w", d.ID, err)
	}
	rw := os.NewFile(uintptr(fd), "disk-"+d.ID)
	defer rw.Close()
	if _, err := rw.WriteAt([]byte(b.String()), 0); err != nil {
		return nil, fmt.Errorf("disk %s: descriptor: %w", d.ID, err)
	}
	// QEMU looks for a member of the set that is open just as it wants it: for reading only.
	f, err := os.Open(fdPath(fd))
	if err != nil {
		return nil, fmt.Errorf("disk %s: descriptor: %w", d.ID, err)
	}
	return f, nil
}

// nodeName is the disk's name among QEMU's block nodes.
func nodeName(disk string) string { return "node" + disk }

// blockNode is the disk's argument of blockdev-add (QEMU qapi/block-core.json).
// set is that of its only part, or of its descriptor.
func blockNode(d hypervisor.Disk, set int) map[string]any {
	protocol := "file"
	if st, err := d.Parts[0].File.Stat(); err == nil && st.Mode()&os.ModeDevice != 0 {
		protocol = "host_device" // the other takes regular files only
	}
	format := "raw"
	if len(d.Parts) > 1 {
		format = "vmdk"
	}
	node := map[string]any{
		"driver": format, "node-name": nodeName(d.ID), "read-only": d.ReadOnly,
		"file": map[string]any{"driver": protocol, "filename": setPath(set), "read-only": d.ReadOnly},
	}
	if !d.ReadOnly {
		node["discard"] = "unmap" // what the guest deletes is given back to the host
		node["file"].(map[string]any)["discard"] = "unmap"
	}
	return node
}

// diskDevice is the disk's argument of device_add.
func diskDevice(d hypervisor.Disk, port int) map[string]any {
	return map[string]any{
		"driver": "virtio-blk-pci", "id": d.ID, "drive": nodeName(d.ID), "serial": d.ID, "bus": portID(port), "addr": "0",
		"disable-legacy": "on", "num-queues": 1,
	}
}

// diskArguments are a disk's part of the command line; its device, unless that is
// plugged later.
func diskArguments(d hypervisor.Disk, l diskFDs, port int, later bool) (a []string) {
	all := l.all()
	for _, fd := range all {
		a = append(a, "-add-fd", fmt.Sprintf("fd=%d,set=%d", fd, fd))
	}
	a = append(a, "-blockdev", jsonText(blockNode(d, all[len(all)-1])))
	if later {
		return a
	}
	return append(a, "-device", jsonText(diskDevice(d, port)))
}

// jsonText is v, which is of a kind that cannot fail, as JSON.
func jsonText(v any) string {
	data, err := json.Marshal(v)
	if err != nil {
		panic("qemu: " + err.Error())
	}
	return string(data)
}

// PlugDisk implements hypervisor.DiskPlugger.
func (vm *VM) PlugDisk(ctx context.Context, d hypervisor.Disk) (path string, err error) {
	defer d.Close() // QEMU has its own by the end
	if err := checkDisk(d); err != nil {
		return "", fmt.Errorf("plug: %w", err)
	}
	port, err := vm.plugs.take(d.ID)
	if err != nil {
		return "", fmt.Errorf("plug: %w", err)
	}
	if err := vm.plugDisk(ctx, d, port); err != nil {
		vm.plugs.free(d.ID)
		return "", fmt.Errorf("plug disk %s: %w", d.ID, err)
	}
	return portPlace(port), nil
}

func (vm *VM) plugDisk(ctx context.Context, d hypervisor.Disk, port int) (err error) {
	var sets []int
	undo := context.WithoutCancel(ctx)
	defer func() {
		if err != nil {
			err = errors.Join(err, vm.removeSets(undo, sets))
		}
	}()
	pass := func(f *os.File) error {
		set := vm.plugs.nextSet()
		if err := vm.qmp.executeWith(ctx, "add-fd", map[string]any{"fdset-id": set}, nil, f); err != nil {
			return err
		}
		sets = append(sets, set)
		return nil
	}
	for _, p := range d.Parts {
		if err := pass(p.File); err != nil {
			return err
		}
	}
	if len(d.Parts) > 1 {
		f, err := descriptor(d, sets)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pass(f); err != nil {
			return err
		}
	}
	if err := vm.qmp.execute(ctx, "blockdev-add", blockNode(d, sets[len(sets)-1]), nil); err != nil {
		return err
	}
	if err := vm.qmp.execute(ctx, "device_add", diskDevice(d, port), nil); err != nil {
		return errors.Join(err, vm.qmp.execute(undo, "blockdev-del", map[string]any{"node-name": nodeName(d.ID)}, nil))
	}
	vm.plugs.remember(d.ID, sets)
	return nil
}

// ResizeDisk implements hypervisor.DiskResizer (QEMU qapi/block-core.json, block_resize).
func (vm *VM) ResizeDisk(ctx context.Context, id string, bytes uint64) error {
	if err := vm.qmp.execute(ctx, "block_resize", map[string]any{"node-name": nodeName(id), "size": bytes}, nil); err != nil {
		return fmt.Errorf("resize disk %s to %d bytes: %w", id, bytes, err)
	}
	return nil
}

// removeSets closes the files that QEMU was handed.
func (vm *VM) removeSets(ctx context.Context, sets []int) error {
	var errs []error
	for _, set := range sets {
		errs = append(errs, vm.qmp.execute(ctx, "remove-fd", map[string]any{"fdset-id": set}, nil))
	}
	return errors.Join(errs...)
}

// UnplugDisk implements hypervisor.DiskPlugger.
func (vm *VM) UnplugDisk(ctx context.Context, id string) error {
	gone, _ := vm.plugs.leave(id)
	if gone == nil {
		return nil
	}
	if err := vm.deleteDevice(ctx, id, gone); err != nil {
		return fmt.Errorf("unplug disk %s: %w", id, err)
	}
	err := vm.qmp.execute(ctx, "blockdev-del", map[string]any{"node-name": nodeName(id)}, nil)
	err = errors.Join(err, vm.removeSets(ctx, vm.plugs.sets(id)))
	vm.plugs.free(id)
	if err != nil {
		return fmt.Errorf("unplug disk %s: %w", id, err)
	}
	return nil
}
