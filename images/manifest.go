// SPDX-License-Identifier: Apache-2.0

// Package images describes the guest's kernel and root image and checks that the
// files on the host are the ones that were built. The builder is in
// images/builder; what the shim needs at run time is here and is small.
package images

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// File names of a built set of images.
const (
	KernelFile   = "vmlinux"
	InitrdFile   = "kata-initrd.img"
	ManifestFile = "manifest.json"
)

// formatVersion is the manifest format that this code writes and reads.
const formatVersion = 1

// Manifest says what a set of images is made of.
type Manifest struct {
	// Format is the version of this structure, 1.
	Format int `json:"format"`
	// Version is the version of this repository that built the images.
	Version string `json:"version"`
	// CreatedFrom are the versions of what went in, by name: "agent", "crun", "iptables".
	CreatedFrom map[string]string `json:"created_from"`
	// Kernel is where the kernel comes from.
	Kernel Kernel `json:"kernel"`
	// Files are the images, by name.
	Files []File `json:"files"`

	path string
}

// Kernel names the distribution package of the guest kernel.
type Kernel struct {
	Package string `json:"package"`
	Version string `json:"version"` // the package's
	Release string `json:"release"` // what uname -r prints in the guest
}

// File is one image file.
type File struct {
	Name   string `json:"name"` // without directory
	SHA256 string `json:"sha256"`
	Size   int64  `json:"size"` // bytes
}

// MismatchError says that a file is not the one that the manifest names.
type MismatchError struct {
	Path           string // the file
	What           string // "size" or "sha256"
	Expected, Have string
	Manifest       string // path of the manifest
}

func (e *MismatchError) Error() string {
	return fmt.Sprintf("image file %s does not match its manifest %s: %s is %s, expected %s; build the images again, or install kernel, image and manifest together",
		e.Path, e.Manifest, e.What, e.Have, e.Expected)
}

// Describe returns the entry for a file that was just built.
func Describe(path string) (File, error) {
	f, err := os.Open(path)
	if err != nil {
		return File{}, fmt.Errorf("images: %w", err)
	}
	defer f.Close()
	sum, size, err := digest(f)
	if err != nil {
		return File{}, fmt.Errorf("images: read %s: %w", path, err)
	}
	return File{Name: filepath.Base(path), SHA256: sum, Size: size}, nil
}

func digest(r io.Reader) (sum string, size int64, err error) {
	h := sha256.New()
	size, err = io.Copy(h, r)
	return hex.EncodeToString(h.Sum(nil)), size, err
}

// ReadManifest reads and checks a manifest; a malformed one is an error that
// names the field.
func ReadManifest(path string) (*Manifest, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("image manifest: %w", err)
	}
	var m Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, fmt.Errorf("image manifest %s: %w", path, err)
	}
	m.path = path
	if err := m.check(); err != nil {
		return nil, fmt.Errorf("image manifest %s: %w", path, err)
	}
	return &m, nil
}

func (m *Manifest) check() error {
	if m.Format != formatVersion {
		return fmt.Errorf("format is %d: want %d", m.Format, formatVersion)
	}
	if len(m.Files) == 0 {
		return errors.New("files is empty: want at least kernel and initrd")
	}
	seen := map[string]bool{}
	for i, f := range m.Files {
		if f.Name == "" || f.Name != filepath.Base(f.Name) || f.Name == "." || f.Name == ".." {
			return fmt.Errorf("files[%d].name is %q: want a file name without a directory", i, f.Name)
		}
		if seen[f.Name] {
			return fmt.Errorf("files[%d].name %q is there twice", i, f.Name)
		}
		seen[f.Name] = true
		if raw, err := hex.DecodeString(f.SHA256); err != nil || len(raw) != sha256.Size {
			return fmt.Errorf("files[%d].sha256 is %q: want 64 hexadecimal digits", i, f.SHA256)
		}
		if f.Size < 0 {
			return fmt.Errorf("files[%d].size is %d: want a number of bytes", i, f.Size)
		}
	}
	return nil
}

// Write writes the manifest as JSON; the same manifest gives the same bytes.
func (m *Manifest) Write(path string) error {
	m.Format = formatVersion
	if err := m.check(); err != nil {
		return fmt.Errorf("image manifest %s: %w", path, err)
	}
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("image manifest %s: %w", path, err)
	}
	if err := os.WriteFile(path, append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("image manifest: %w", err)
	}
	return nil
}

// lookup finds the entry for a path by its base name.
func (m *Manifest) lookup(path string) (File, error) {
	for _, f := range m.Files {
		if f.Name == filepath.Base(path) {
			return f, nil
		}
	}
	return File{}, fmt.Errorf("image file %s is not in the manifest %s, which names %s", path, m.path, m.names())
}

func (m *Manifest) names() string {
	s := ""
	for i, f := range m.Files {
		if i > 0 {
			s += ", "
		}
		s += f.Name
	}
	return s
}

// Verify reads every file of the manifest in dir in full and compares it. The
// error is a *MismatchError where a file differs.
func (m *Manifest) Verify(dir string) error {
	for _, f := range m.Files {
		if err := m.VerifyFile(filepath.Join(dir, f.Name)); err != nil {
			return err
		}
	}
	return nil
}

// VerifyFile reads one file in full and compares it with the manifest's entry of
// the same base name.
func (m *Manifest) VerifyFile(path string) error {
	want, err := m.lookup(path)
	if err != nil {
		return err
	}
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("image file: %w", err)
	}
	defer file.Close()
	return m.compare(file, path, want)
}

func (m *Manifest) compare(file *os.File, path string, want File) error {
	info, err := file.Stat()
	if err != nil {
		return fmt.Errorf("image file: %w", err)
	}
	// The size tells a truncated file without reading the rest of it.
	if info.Size() != want.Size {
		return &MismatchError{Path: path, What: "size", Expected: fmt.Sprint(want.Size), Have: fmt.Sprint(info.Size()), Manifest: m.path}
	}
	sum, _, err := digest(file)
	if err != nil {
		return fmt.Errorf("image file %s: %w", path, err)
	}
	if sum != want.SHA256 {
		return &MismatchError{Path: path, What: "sha256", Expected: want.SHA256, Have: sum, Manifest: m.path}
	}
	return nil
}
