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
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

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
const formatVersion = 1

// Manifest says what a checkpoint is.
type Manifest struct {
	Version int       `json:"version"`
	Sandbox string    `json:"sandbox"` // the pod's id
	Created time.Time `json:"created"` // when the guest stood still
	// Machine is what a machine must be like that goes on with it.
	Machine template.Key `json:"machine"`
	Memory  File         `json:"memory"`
	State   File         `json:"state"`
	Disks   []Disk       `json:"disks"`
	// Interfaces and Routes are the guest's network: messages of the agent's
	// protocol in the JSON form of protobuf.
	Interfaces []json.RawMessage `json:"interfaces"`
	Routes     []json.RawMessage `json:"routes"`
	Containers []Container       `json:"containers"`
}

// File is a sparse file of the checkpoint.
type File struct {
	Bytes  int64  `json:"bytes"`
	SHA256 string `json:"sha256"` // of what is not zero, see template.CopySparse
}

// Disk is a disk of the machine, in the order of its ports.
type Disk struct {
	ID       string `json:"id"`
	ReadOnly bool   `json:"read_only"`
	// Parts are the digests of the files that a read-only disk consists of.
	Parts []File `json:"parts,omitempty"`
	// Content is what a disk that is written holds.
	Content *File `json:"content,omitempty"`
}

// Container is a container of the pod.
type Container struct {
	ID     string `json:"id"`
	Bundle string `json:"bundle"`
	// State is "created", "running" or "paused"; its processes are frozen in the latter two.
	State string `json:"state"`
	// PID is the first process's number in the guest, 0 if that is not known.
	PID uint32 `json:"pid"`
	// Terminal, Stdin, Stdout and Stderr are the streams that its process has.
	Terminal bool `json:"terminal"`
	Stdin    bool `json:"stdin"`
	Stdout   bool `json:"stdout"`
	Stderr   bool `json:"stderr"`
	// Spec is the container's specification.
	Spec json.RawMessage `json:"spec"`
}

// Checkpoint is one on disk.
type Checkpoint struct {
	Manifest
	dir string
}

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
	files := map[string]File{memoryFile: c.Memory, stateFile: c.State}
	for _, d := range c.Disks {
		if d.ID == "" || strings.ContainsAny(d.ID, "/.") {
			return nil, fmt.Errorf("disk ID %q: want letters and digits", d.ID)
		}
		if d.Content != nil {
			files[diskPrefix+d.ID] = *d.Content
		}
	}
	for name, f := range files {
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
	errs := []error{check(memoryFile, c.Memory), check(stateFile, c.State)}
	for _, d := range c.Disks {
		if d.Content != nil {
			errs = append(errs, check(diskPrefix+d.ID, *d.Content))
		}
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
