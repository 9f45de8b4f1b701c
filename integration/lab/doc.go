// SPDX-License-Identifier: Apache-2.0

// Package lab gives `make run`, the end-to-end tests and the bench a containerd
// of their own: a private daemon of a chosen version with its own root, state
// and socket, container images built locally with no registry, and a Stop that
// leaves nothing behind and says so when something had to be swept up.
//
//	c, err := lab.Start(ctx, lab.Options{Version: "2.4", ShimDir: bin, ConfigFile: conf})
//	defer c.Stop(ctx)
//	err = c.ImportBusybox(ctx)
//	r, err := c.Run(ctx, "io.containerd.kata.v2", "id1", nil, "uname", "-r")
//
// Everything needs root. The programs come from Dir, which scripts/setup.sh fills.
package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Dir is where the lab's programs are: $KATA_LAB, else lab/ in $KATA_CACHE, else
// in the cache directory that scripts/setup.sh uses by default. It holds
// containerd-<version>/ for each of Versions, runc/ and virtiofsd/.
func Dir() (string, error) {
	if dir := os.Getenv("KATA_LAB"); dir != "" {
		return dir, nil
	}
	cache := os.Getenv("KATA_CACHE")
	if cache == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("lab: KATA_LAB and KATA_CACHE are unset: %w", err)
		}
		cache = filepath.Join(home, ".cache", "kata-go")
	}
	dir := filepath.Join(cache, "lab")
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("lab: %s is missing: run scripts/setup.sh first: %w", dir, err)
	}
	return dir, nil
}

// RustVirtiofsd is the path of the Rust virtio-fs daemon that scripts/setup.sh
// unpacked; the C daemon of QEMU 7.2 is installed as /usr/lib/qemu/virtiofsd.
func RustVirtiofsd() (string, error) {
	dir, err := Dir()
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "virtiofsd", "virtiofsd")
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("lab: virtiofsd: run scripts/setup.sh first: %w", err)
	}
	return path, nil
}
