// SPDX-License-Identifier: Apache-2.0

// Package deploy puts a build of this repository onto a host and takes it off
// again: programs, guest images, the default configuration and, if wanted,
// containerd's runtime handler. The YAML and TOML files beside it are what an
// operator needs of Kubernetes and containerd.
package deploy

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/images"
	"github.com/kata-v2/kata/internal/config"
)

// handlers are the drop-ins for containerd, by the version of its configuration.
//
//go:embed containerd-v2.toml containerd-v3.toml
var handlers embed.FS

// Where things go, below the host's root. The shim's built-in defaults and
// containerd's search in PATH find them there.
const (
	binDir     = "usr/local/bin"
	imageDir   = "usr/share/kata-containers"
	configFile = "usr/share/defaults/kata-containers/configuration.toml"
)

// Programs are what a host runs; the agent is in the guest's image.
var Programs = []string{"containerd-shim-kata-v2", "kata-ctl"}

// files are what Install writes: where to, and where from below a build.
func files() map[string]string {
	out := map[string]string{}
	for _, p := range Programs {
		out[filepath.Join(binDir, p)] = filepath.Join("bin", p)
	}
	for _, i := range []string{images.KernelFile, images.InitrdFile, images.ManifestFile} {
		out[filepath.Join(imageDir, i)] = filepath.Join("images", i)
	}
	return out
}

// Install copies a build, a directory with bin/ and images/ as `make build
// image` leaves it, below root. Every file is replaced as a whole, so that pods
// that run keep the one they have open. It returns the paths that have changed.
func Install(build, root string) ([]string, error) {
	var changed []string
	add := func(path string, did bool, err error) error {
		if did {
			changed = append(changed, path)
		}
		return err
	}
	all := files()
	for _, to := range slices.Sorted(maps.Keys(all)) {
		path := filepath.Join(root, to)
		did, err := copyFile(filepath.Join(build, all[to]), path)
		if err := add(path, did, err); err != nil {
			return changed, fmt.Errorf("install %s: %w", path, err)
		}
	}
	path := filepath.Join(root, configFile)
	did, err := writeFile(path, []byte(config.DefaultTOML()), 0o644)
	if err := add(path, did, err); err != nil {
		return changed, fmt.Errorf("install %s: %w", path, err)
	}
	return changed, nil
}

// Uninstall removes what Install wrote below root.
func Uninstall(root string) error {
	var errs []error
	for _, to := range append(slices.Sorted(maps.Keys(files())), configFile) {
		if err := os.Remove(filepath.Join(root, to)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	for _, dir := range []string{imageDir, filepath.Dir(configFile)} {
		// What somebody else has put there stays, and its directory.
		if err := os.Remove(filepath.Join(root, dir)); err != nil && !errors.Is(err, fs.ErrNotExist) && !isNotEmpty(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func isNotEmpty(err error) bool { return errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) }

// copyFile makes to a copy of from, with its mode, and tells whether it was none yet.
func copyFile(from, to string) (bool, error) {
	data, err := os.ReadFile(from)
	if err != nil {
		return false, err
	}
	info, err := os.Stat(from)
	if err != nil {
		return false, err
	}
	return writeFile(to, data, info.Mode().Perm())
}

// writeFile replaces a file when its content or mode is another.
func writeFile(path string, data []byte, mode fs.FileMode) (changed bool, err error) {
	if same(path, data, mode) {
		return false, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return false, err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-")
	if err != nil {
		return false, err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = io.Copy(f, bytes.NewReader(data))
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return false, err
	}
	return true, os.Rename(f.Name(), path)
}

func same(path string, data []byte, mode fs.FileMode) bool {
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != mode || info.Size() != int64(len(data)) {
		return false
	}
	old, err := os.ReadFile(path)
	return err == nil && bytes.Equal(old, data)
}
