// SPDX-License-Identifier: Apache-2.0

package checkpoint

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/sandbox/template"
)

// Writer makes a checkpoint.
type Writer struct {
	dir   string
	made  bool // the directory is ours
	files []string
}

// Create begins a checkpoint in a directory that does not exist, or is empty.
func Create(dir string) (*Writer, error) {
	if !filepath.IsAbs(dir) {
		return nil, fmt.Errorf("checkpoint directory %q: the path must be absolute: %w", dir, errdefs.ErrInvalidArgument)
	}
	w := &Writer{dir: dir}
	err := os.Mkdir(dir, 0o700)
	if err == nil {
		w.made = true
		return w, nil
	}
	if !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("checkpoint directory: %w", err)
	}
	if err := trusted(dir, unix.S_IFDIR); err != nil {
		return nil, fmt.Errorf("checkpoint directory: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("checkpoint directory: %w", err)
	}
	if len(entries) > 0 {
		return nil, fmt.Errorf("checkpoint directory %s is not empty: name one that is new: %w", dir, errdefs.ErrAlreadyExists)
	}
	return w, nil
}

// State is the file for the devices' state, which the caller closes.
func (w *Writer) State() (*os.File, error) { return w.create(stateFile) }

// Memory keeps the guest's memory.
func (w *Writer) Memory(from *os.File) (File, error) { return w.copy(memoryFile, from) }

// Disk keeps what is on a disk.
func (w *Writer) Disk(id string, from *os.File) (File, error) { return w.copy(diskPrefix+id, from) }

// Part keeps a piece of a read-only disk that is no file of the host.
func (w *Writer) Part(disk string, i int, from *os.File) (File, error) {
	return w.copy(partFile(disk, i), from)
}

func (w *Writer) create(name string) (*os.File, error) {
	w.files = append(w.files, name)
	f, err := os.OpenFile(filepath.Join(w.dir, name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("checkpoint: %w", err)
	}
	return f, nil
}

func (w *Writer) copy(name string, from *os.File) (out File, err error) {
	f, err := w.create(name)
	if err != nil {
		return out, err
	}
	defer f.Close()
	// Not Stat: that of a block device has no size.
	if out.Bytes, err = from.Seek(0, io.SeekEnd); err == nil {
		err = f.Truncate(out.Bytes)
	}
	if err == nil {
		out.SHA256, err = template.CopySparse(f, from)
	}
	if err != nil {
		err = fmt.Errorf("checkpoint: %s: %w", name, err)
	}
	return out, err
}

// DigestOf is that of a file that is not kept.
func DigestOf(f *os.File) (out File, err error) {
	if out.Bytes, err = f.Seek(0, io.SeekEnd); err == nil {
		out.SHA256, err = template.Digest(f)
	}
	return out, err
}

// Finish writes the manifest: the checkpoint is there.
func (w *Writer) Finish(m Manifest) error {
	m.Version = formatVersion
	f, err := os.Open(filepath.Join(w.dir, stateFile))
	if err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	defer f.Close()
	if m.State, err = DigestOf(f); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	// Under another name first: what has the name is whole.
	name := "." + manifestFile
	w.files = append(w.files, name, manifestFile)
	if err := os.WriteFile(filepath.Join(w.dir, name), append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	if err := os.Rename(filepath.Join(w.dir, name), filepath.Join(w.dir, manifestFile)); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	return nil
}

// Abort removes what was written.
func (w *Writer) Abort() error {
	var errs []error
	for _, name := range w.files {
		if err := os.Remove(filepath.Join(w.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if w.made {
		errs = append(errs, os.Remove(w.dir))
	}
	return errors.Join(errs...)
}
