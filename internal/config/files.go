// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
)

// virtiofsdPaths are searched when virtio_fs_daemon is empty: the Rust daemon,
// then the C one of QEMU 7.2.
var virtiofsdPaths = []string{"/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"}

// FileError says that a file which the configuration names cannot be used.
type FileError struct {
	// Key is "section.key" and Origin where it was set.
	Key, Origin string
	// Path is the file.
	Path string
	// Err is the cause and Fix what to do.
	Err error
	Fix string
}

func (e *FileError) Error() string {
	return fmt.Sprintf("%s (%s): %v; %s", e.Path, e.Setting(), e.Err, e.Fix)
}

// Setting names the key and where it was set, without the file.
func (e *FileError) Setting() string {
	if e.Origin == builtIn {
		return e.Key + ", " + builtIn
	}
	return e.Key + ", set in " + e.Origin
}

func (e *FileError) Unwrap() error { return e.Err }

// fixes says what to do about a missing file, by key.
var fixes = map[string]string{
	"path":             "install QEMU (on Debian: apt-get install qemu-system-x86) or set the key to where it is",
	"kernel":           "install the guest kernel there or set the key to where it is",
	"initrd":           "install the guest image there or set the key to where it is",
	"image":            "install the guest image there or set the key to where it is",
	"firmware":         "install the firmware there, or leave the key empty for QEMU's own",
	"virtio_fs_daemon": "install virtiofsd (on Debian 12 it comes with qemu-system-common) or set the key to where it is",
	"manifest":         "put the manifest there, or leave the key empty",
}

// CheckFiles looks at every file that the configuration names. The error joins
// one *FileError for each file that is missing or not a regular, readable file,
// or for a program not executable.
func (c *Config) CheckFiles() error {
	var errs []error
	v := reflect.ValueOf(c).Elem()
	for _, s := range schema() {
		for _, f := range s.fields {
			if p := v.FieldByIndex(f.index).String(); f.path == "file" && p != "" {
				errs = append(errs, c.checkFile(f.name(), f.key, p, f.key == "path"))
			}
		}
	}
	if c.QEMU.SharedFS != "none" {
		if p, err := c.Virtiofsd(); err != nil {
			errs = append(errs, err)
		} else {
			errs = append(errs, c.checkFile("hypervisor.qemu.virtio_fs_daemon", "virtio_fs_daemon", p, true))
		}
	}
	if p := c.QEMU.Manifest; p != "" {
		errs = append(errs, c.checkFile("hypervisor.qemu.manifest", "manifest", p, false))
	}
	return errors.Join(errs...)
}

func (c *Config) checkFile(name, key, path string, program bool) error {
	fe := &FileError{Key: name, Origin: c.Origin(name), Path: path, Fix: fixes[key]}
	st, err := os.Stat(path)
	switch {
	case err != nil:
		// os.PathError repeats the path; keep its cause.
		var pe *os.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		fe.Err = err
	case !st.Mode().IsRegular():
		fe.Err = errors.New("not a regular file")
	case program && st.Mode()&0o111 == 0:
		fe.Err = errors.New("not executable")
	case st.Size() == 0:
		fe.Err = errors.New("empty")
	default:
		return nil
	}
	return fe
}

// Virtiofsd returns the virtio-fs daemon's path: the configured one, or the
// first of the usual places that exists. The error is a *FileError.
func (c *Config) Virtiofsd() (string, error) {
	if c.QEMU.VirtioFSDaemon != "" {
		return c.QEMU.VirtioFSDaemon, nil
	}
	for _, p := range virtiofsdPaths {
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	const key = "hypervisor.qemu.virtio_fs_daemon"
	return "", &FileError{Key: key, Origin: c.Origin(key), Path: virtiofsdPaths[0], Fix: fixes["virtio_fs_daemon"],
		Err: fmt.Errorf("neither this nor %s exists: %w", virtiofsdPaths[1], os.ErrNotExist)}
}

// ManifestPath returns the manifest to verify the guest's files with, or "" when
// there is none: manifest is empty and no manifest.json is beside the kernel.
func (c *Config) ManifestPath() string {
	if c.QEMU.Manifest != "" {
		return c.QEMU.Manifest
	}
	p := filepath.Join(filepath.Dir(c.QEMU.Kernel), "manifest.json")
	if _, err := os.Stat(p); err != nil {
		return ""
	}
	return p
}
