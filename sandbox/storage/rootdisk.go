// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// Source is a disk that is not attached yet.
type Source struct {
	// Key is equal for sources that are the same disk: it names the files by device
	// and inode.
	Key string
	// Parts and ReadOnly are those of hypervisor.Disk. The files are the Source's
	// until it is attached or closed.
	Parts    []hypervisor.DiskPart
	ReadOnly bool
}

// Close closes the files.
func (s *Source) Close() {
	for _, p := range s.Parts {
		p.File.Close()
	}
}

// RootDisks are the open disks of a Root.
type RootDisks struct {
	root        *Root
	partitioned bool
	verity      []verity // by lower; empty root hash for none
	devices     []device // the further devices of the lowers
	// Layers holds all lowers; Upper what is written. Either may be nil.
	Layers, Upper *Source
}

// device is a further device of a lower: a partition of its own, after those of the lowers.
type device struct {
	window
	verity verity
}

// Open opens and checks the files of a root for a pod with the disks in. Errors
// name the layer.
func (r *Root) Open(in *Disks) (_ *RootDisks, err error) {
	d := &RootDisks{root: r}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	if len(r.Lowers) > 0 {
		if err := d.openLowers(); err != nil {
			return nil, err
		}
	}
	if r.Upper == nil {
		return d, nil
	}
	if d.Upper, err = in.OpenSource(r.Upper.Source, r.ReadOnly || slices.Contains(r.Upper.Options, "ro")); err != nil {
		return nil, fmt.Errorf("rootfs: %w", err)
	}
	return d, nil
}

// Close closes files that were not attached.
func (d *RootDisks) Close() {
	for _, s := range d.Sources() {
		s.Close()
	}
}

// Sources are the disks, the layers' first.
func (d *RootDisks) Sources() (out []*Source) {
	for _, s := range []*Source{d.Layers, d.Upper} {
		if s != nil {
			out = append(out, s)
		}
	}
	return out
}

// openLowers joins the layers to one disk, with a partition for each when there
// are several, and one for each further device of a layer.
func (d *RootDisks) openLowers() error {
	d.Layers = &Source{ReadOnly: true}
	lowers := d.root.Lowers
	count := len(lowers)
	for _, l := range lowers {
		count += len(l.Devices)
	}
	if count > maxPartitions {
		return fmt.Errorf("rootfs: %d layers and devices of them: at most %d fit one disk: %w", count, maxPartitions, errdefs.ErrInvalidArgument)
	}
	d.partitioned = count > 1
	var regions []region
	var key strings.Builder
	for i, l := range lowers {
		o, err := openLayer(l)
		if err != nil {
			return fmt.Errorf("rootfs layer %d (%s): %w", i, l.Source, err)
		}
		d.Layers.Parts = append(d.Layers.Parts, o.parts...)
		d.verity = append(d.verity, o.verity[0])
		var r region
		for j, p := range o.parts {
			if j > 0 {
				d.devices = append(d.devices, device{window{of: i, at: r.count, count: p.Sectors}, o.verity[j]})
			}
			r.count += p.Sectors
			k, err := fileKey(p.File)
			if err != nil {
				return fmt.Errorf("rootfs layer %d (%s): %w", i, l.Source, err)
			}
			key.WriteString(k)
		}
		if r.shown = r.count; o.whole {
			// Not one EROFS: who reads beyond the metadata without the devices gets an error.
			r.shown = o.parts[0].Sectors
			key.WriteByte('w')
		}
		regions = append(regions, r)
		key.WriteByte('/')
	}
	d.Layers.Key = key.String()
	if !d.partitioned {
		return nil
	}
	var windows []window
	for _, v := range d.devices {
		windows = append(windows, v.window)
	}
	head, tail := gpt(regions, windows)
	first, err := memoryPart("layers-head", head)
	if err != nil {
		return err
	}
	d.Layers.Parts = slices.Insert(d.Layers.Parts, 0, first)
	end, err := memoryPart("layers-tail", tail)
	if err != nil {
		return err
	}
	d.Layers.Parts = append(d.Layers.Parts, end)
	return nil
}

// openedLayer is a layer's files: the EROFS and its devices.
type openedLayer struct {
	parts  []hypervisor.DiskPart
	verity []verity // by part
	whole  bool     // the parts are whole files, not one EROFS; see erofsSuper.region
}

// openLayer opens a layer's files, which are closed on error.
func openLayer(l Layer) (o *openedLayer, err error) {
	var files []*os.File
	defer func() {
		if err != nil {
			for _, f := range files {
				f.Close()
			}
		}
	}()
	for _, path := range append([]string{l.Source}, l.Devices...) {
		f, err := openFile(path, os.O_RDONLY)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	super, err := readErofs(files[0])
	if err != nil {
		return nil, err
	}
	size, err := sizeOf(files[0])
	if err != nil {
		return nil, err
	}
	if size < super.size {
		return nil, fmt.Errorf("the file has %d bytes, its superblock says %d: it is truncated: %w", size, super.size, errdefs.ErrInvalidArgument)
	}
	o = &openedLayer{}
	for i, f := range files {
		v, err := verityOf(l, i, f)
		if err != nil {
			return nil, err
		}
		o.verity = append(o.verity, v)
		o.whole = o.whole || len(files) > 1 && v.RootHash != ""
	}
	if len(l.Devices) > 0 {
		o.parts, err = super.region(files[0], files[1:], o.whole)
		return o, err
	}
	if err := super.within(size); err != nil {
		return nil, err
	}
	o.parts = []hypervisor.DiskPart{{File: files[0], Sectors: sectors(size)}}
	return o, nil
}

// OpenSource opens a file or block device as a disk of its own. A block device
// that is to be written must not be in use on the host, unless by this pod.
func (d *Disks) OpenSource(path string, readOnly bool) (*Source, error) {
	flags := os.O_RDWR
	if readOnly {
		flags = os.O_RDONLY
	}
	f, err := openFile(path, flags)
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w", path, err)
	}
	s := &Source{Parts: []hypervisor.DiskPart{{File: f}}, ReadOnly: readOnly}
	if s.Key, err = fileKey(f); err == nil && !readOnly && isDevice(f) && !d.has(s.Key) {
		f.Close()
		// Refused while it is mounted, or held by somebody else (open(2)).
		s.Parts[0].File, err = openFile(path, flags|unix.O_EXCL)
	}
	if err == nil && readOnly && isDevice(f) {
		// What the host has of the device in its cache may be older than what a file system on it has written.
		err = unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0)
	}
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("disk %s: %w", path, err)
	}
	return s, nil
}

func isDevice(f *os.File) bool {
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeDevice != 0
}

// openFile opens a regular file or a block device; nothing else is a disk, and to
// open some of the rest would block.
func openFile(path string, flags int) (*os.File, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("path %q: want an absolute one: %w", path, errdefs.ErrInvalidArgument)
	}
	st, err := os.Stat(path)
	if err != nil {
		return nil, typed(err)
	}
	device := st.Mode()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice
	if !st.Mode().IsRegular() && !device {
		return nil, fmt.Errorf("%s is a %s: want a regular file or a block device: %w", path, st.Mode().Type(), errdefs.ErrInvalidArgument)
	}
	f, err := os.OpenFile(path, flags|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, typed(err)
	}
	return f, nil
}

// typed gives what the system says of a file its kind.
func typed(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("it is mounted or in use on the host: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return err
}

// fileKey names an open file, or the device that it stands for.
func fileKey(f *os.File) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return "", err
	}
	return statKey(&st), nil
}

// pathKey is the key that OpenSource gives the disk at path.
func pathKey(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", fmt.Errorf("disk %s: %w", path, typed(err))
	}
	return statKey(&st), nil
}

func statKey(st *unix.Stat_t) string {
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFBLK:
		return fmt.Sprintf("b%x,", st.Rdev)
	case st.Nlink == 0: // in memory
		return ""
	}
	return fmt.Sprintf("%x:%x,", st.Dev, st.Ino)
}

// GuestRoot is where a container's root of disks is mounted in the guest.
func GuestRoot(container string) string {
	return filepath.Join(protocols.GuestRunDir, container, "rootfs")
}

// Storages tell the guest how to mount the root: from the disks at the places
// layers and upper, whichever of them there is.
func (d *RootDisks) Storages(container, layers, upper string) []*agentpb.Storage {
	root := GuestRoot(container)
	if len(d.root.Lowers) == 0 {
		return []*agentpb.Storage{d.wholeStorage(root, upper)}
	}
	var out []*agentpb.Storage
	if d.Upper != nil {
		u := d.root.Upper
		out = append(out, &agentpb.Storage{
			Driver: "blk", Source: upper, Fstype: u.Type, MountPoint: root,
			Options: append(slices.Clone(u.Options), protocols.OptOverlayUpper, protocols.OptMultiLayer),
		})
	}
	for i, l := range d.root.Lowers {
		s := &agentpb.Storage{Driver: "blk", Source: layers, Fstype: "erofs", MountPoint: root, Options: append(slices.Clone(l.Options), protocols.OptOverlayLower, protocols.OptMultiLayer)}
		if d.partitioned {
			s.Options = append(s.Options, protocols.OptPartitioned, protocols.OptPartition+strconv.Itoa(i+1))
		}
		for j, v := range d.devices {
			if v.of == i {
				s.Options = append(s.Options, protocols.OptDevicePartition+v.verity.after(len(d.root.Lowers)+j+1))
			}
		}
		if v := d.verity[i]; v.RootHash != "" {
			s.Options = append(s.Options, protocols.OptVerity, protocols.OptVerityRoot+v.RootHash, protocols.OptVerityOffset+strconv.FormatUint(v.HashOffset, 10))
		}
		if i == 0 {
			s.Options = append(s.Options, d.overlayOptions()...)
		}
		out = append(out, s)
	}
	return out
}

// overlayOptions are about the overlay as a whole; the first layer carries them.
func (d *RootDisks) overlayOptions() (out []string) {
	if d.Upper == nil && !d.root.ReadOnly {
		out = append(out, protocols.OptMemoryUpper)
	}
	for _, o := range d.root.Options {
		out = append(out, protocols.OptOverlay+o)
	}
	return out
}

// wholeStorage is a root on one disk, without layers.
func (d *RootDisks) wholeStorage(root, place string) *agentpb.Storage {
	u := d.root.Upper
	s := &agentpb.Storage{Driver: "blk", Source: place, Fstype: u.Type, MountPoint: root, Options: slices.Clone(u.Options)}
	if d.root.ReadOnly && !slices.Contains(s.Options, "ro") {
		s.Options = append(s.Options, "ro")
	}
	if d.root.Dir != "" {
		s.Options = append(s.Options, protocols.OptOverlayUpper, protocols.OptMultiLayer, protocols.OptRootDir+d.root.Dir)
	}
	return s
}
