// SPDX-License-Identifier: Apache-2.0

package checkpoint

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/sandbox/template"
)

// The files.
const (
	manifestFile = "manifest.json"
	memoryFile   = "memory"
	stateFile    = "state"
	diskPrefix   = "disk-"
)

// formatVersion changes when an older checkpoint cannot be read any more.
const formatVersion = 2

// Checkpoint is one on disk.
type Checkpoint struct {
	Manifest
	dir string
}

// Dir is the checkpoint's directory.
func (c *Checkpoint) Dir() string { return c.dir }

// Open reads a checkpoint and looks whether it is whole, as far as can be told
// without reading its content; see Verify. Errors are InvalidArgument or NotFound.
func Open(dir string) (*Checkpoint, error) {
	c, err := open(dir)
	if err != nil {
		kind := error(errdefs.ErrInvalidArgument)
		if errors.Is(err, fs.ErrNotExist) {
			kind = errdefs.ErrNotFound
		}
		return nil, fmt.Errorf("checkpoint %s: %w: %w", dir, err, kind)
	}
	return c, nil
}

func open(dir string) (*Checkpoint, error) {
	if !filepath.IsAbs(dir) {
		return nil, errors.New("the path must be absolute")
	}
	c := &Checkpoint{dir: dir}
	if err := trusted(dir, unix.S_IFDIR); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, manifestFile)
	if err := trusted(path, unix.S_IFREG); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, &c.Manifest); err != nil {
		return nil, fmt.Errorf("%s: %w", manifestFile, err)
	}
	if c.Version != formatVersion {
		return nil, fmt.Errorf("version %d: this build reads %d", c.Version, formatVersion)
	}
	for _, d := range c.Disks {
		if d.ID == "" || strings.ContainsAny(d.ID, "/.-") {
			return nil, fmt.Errorf("disk ID %q: want letters and digits", d.ID)
		}
		if d.ReadOnly != (d.Content == nil) {
			return nil, fmt.Errorf("disk %s: one that is written needs content, and no other has any", d.ID)
		}
	}
	for name, f := range c.files() {
		path := filepath.Join(dir, name)
		if err := trusted(path, unix.S_IFREG); err != nil {
			return nil, err
		}
		if st, err := os.Stat(path); err != nil || st.Size() != f.Bytes {
			return nil, errors.Join(err, fmt.Errorf("%s does not have %d bytes: it is truncated", name, f.Bytes))
		}
	}
	return c, nil
}

// files are those that the checkpoint holds beside its manifest.
func (m *Manifest) files() map[string]File {
	files := map[string]File{memoryFile: m.Memory, stateFile: m.State}
	for _, d := range m.Disks {
		if d.Content != nil {
			files[diskPrefix+d.ID] = *d.Content
		}
		for i, p := range d.Parts {
			if p.Path == "" {
				files[partFile(d.ID, i)] = p.File
			}
		}
	}
	return files
}

// partFile holds a piece of a read-only disk.
func partFile(disk string, i int) string { return fmt.Sprintf("%s%s-%d", diskPrefix, disk, i) }

// trusted refuses what somebody else than root can change.
func trusted(path string, kind uint32) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	switch {
	case st.Mode&unix.S_IFMT != kind:
		return fmt.Errorf("%s: mode %#o: want a file of type %#o", path, st.Mode, kind)
	case st.Uid != 0 || st.Mode&0o022 != 0:
		return fmt.Errorf("%s: owner %d, mode %#o: want root's, writable by nobody else", path, st.Uid, st.Mode&0o7777)
	}
	return nil
}

// Verify reads all of it and compares the digests.
func (c *Checkpoint) Verify() error {
	check := func(name string, want File) error {
		f, err := os.Open(filepath.Join(c.dir, name))
		if err != nil {
			return err
		}
		defer f.Close()
		sum, err := template.Digest(f)
		if err == nil && sum != want.SHA256 {
			err = fmt.Errorf("%s is not what was saved: %w", name, errdefs.ErrInvalidArgument)
		}
		return err
	}
	var errs []error
	for name, f := range c.files() {
		errs = append(errs, check(name, f))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("checkpoint %s: %w", c.dir, err)
	}
	return nil
}

// OpenState opens the devices' state.
func (c *Checkpoint) OpenState() (*os.File, error) { return os.Open(filepath.Join(c.dir, stateFile)) }

// LoadMemory is a copy of the memory in an anonymous file. One that is not what
// was saved is InvalidArgument.
func (c *Checkpoint) LoadMemory() (*os.File, error) {
	f, err := template.NewMemory(c.Memory.Bytes)
	if err != nil {
		return nil, err
	}
	if err := c.load(memoryFile, f, c.Memory); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// LoadDisk makes a file what the disk was.
func (c *Checkpoint) LoadDisk(d Disk, to *os.File) error {
	st, err := to.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("disk %s: %s is a %s: want a regular file: %w", d.ID, to.Name(), st.Mode().Type(), errdefs.ErrInvalidArgument)
	}
	if err := errors.Join(to.Truncate(0), to.Truncate(d.Content.Bytes)); err != nil { // all zeros
		return fmt.Errorf("disk %s: %w", d.ID, err)
	}
	return c.load(diskPrefix+d.ID, to, *d.Content)
}

// OpenDisk opens what a disk was, for a machine that has nobody else's files for
// it: one that is written is a copy without a name, on the file system of the pod's
// layers, where the snapshots are as a rule, or on that of the checkpoint.
func (c *Checkpoint) OpenDisk(d Disk) (_ hypervisor.Disk, err error) {
	out := hypervisor.Disk{ID: d.ID, Place: d.Place, ReadOnly: d.ReadOnly}
	defer func() {
		if err != nil {
			out.Close()
		}
	}()
	if !d.ReadOnly {
		f, err := c.nameless()
		if err != nil {
			return out, fmt.Errorf("checkpoint: disk %s: copy: %w", d.ID, err)
		}
		out.Parts = []hypervisor.DiskPart{{File: f}}
		return out, c.LoadDisk(d, f)
	}
	for i, p := range d.Parts {
		f, err := c.openPart(d.ID, i, p)
		if err != nil {
			return out, fmt.Errorf("checkpoint: disk %s: part %d: %w", d.ID, i, err)
		}
		out.Parts = append(out.Parts, hypervisor.DiskPart{File: f, Sectors: p.Sectors})
	}
	return out, nil
}

// nameless is a new file for a disk.
func (c *Checkpoint) nameless() (*os.File, error) {
	for _, d := range c.Disks {
		for _, p := range d.Parts {
			if p.Path == "" {
				continue
			}
			if f, err := os.OpenFile(filepath.Dir(p.Path), os.O_RDWR|unix.O_TMPFILE, 0o600); err == nil {
				return f, nil
			}
		}
	}
	return namelessIn(c.dir)
}

// namelessIn is a new file on the file system of a directory, which may not know
// files that never had a name (open(2), O_TMPFILE).
func namelessIn(dir string) (*os.File, error) {
	f, err := os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o600)
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) {
		return f, err
	}
	if f, err = os.CreateTemp(dir, ".copy-"); err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (c *Checkpoint) openPart(disk string, i int, p Part) (*os.File, error) {
	path, name := p.Path, p.Path
	if path == "" {
		name = partFile(disk, i) // which is no path: a later checkpoint keeps it too
		path = filepath.Join(c.dir, name)
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		err = &os.PathError{Op: "open", Path: path, Err: err}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: the image's layers must be where they were: %w", err, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	now, err := DigestOf(f)
	if err == nil && now != p.File {
		err = fmt.Errorf("%s is not what it was: the pod needs the same image: %w", path, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (c *Checkpoint) load(name string, to *os.File, want File) error {
	from, err := os.Open(filepath.Join(c.dir, name))
	if err != nil {
		return err
	}
	defer from.Close()
	sum, err := template.CopySparse(to, from)
	if err == nil && sum != want.SHA256 {
		err = fmt.Errorf("it is not what was saved: %w", errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fmt.Errorf("checkpoint %s: %s: %w", c.dir, name, err)
	}
	return nil
}
