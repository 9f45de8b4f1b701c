// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// containerd's configuration and our part of it, below the host's root.
const (
	containerdConfig = "etc/containerd/config.toml"
	containerdDropIn = "etc/containerd/conf.d/kata.toml"
)

// importLine is what is added to a configuration that has no imports;
// RemoveHandler knows it by its comment. A relative path is one from the main
// file's directory (containerd cmd/containerd/server/config, resolveImports).
const importLine = `imports = ["conf.d/kata.toml"] # kata` + "\n"

// containerdMain is what is read of containerd's main configuration file.
type containerdMain struct {
	Version int      `toml:"version"`
	Imports []string `toml:"imports"`
}

// AddHandler adds the runtime handler "kata" to containerd's configuration below
// root, as a drop-in of the main file's version, and imports it. A main file
// that is missing is made, in version 2, which every containerd reads. It tells
// whether anything has changed: then containerd is to be restarted.
func AddHandler(root string) (changed bool, err error) {
	path := filepath.Join(root, containerdConfig)
	text, main, err := readMain(path)
	if err != nil {
		return false, err
	}
	handler, err := handlers.ReadFile(fmt.Sprintf("containerd-v%d.toml", main.Version))
	if err != nil {
		return false, fmt.Errorf("%s: version = %d: only 2 and 3 are known; convert it with `containerd config migrate`", path, main.Version)
	}
	if !imported(main.Imports) {
		if main.Imports != nil {
			return false, fmt.Errorf("%s: imports does not cover /%s: add that path to it", path, containerdDropIn)
		}
		text = addImport(text, main.Version)
	}
	drop, err := writeFile(filepath.Join(root, containerdDropIn), handler, 0o644)
	if err != nil {
		return false, fmt.Errorf("containerd's handler: %w", err)
	}
	mainChanged, err := writeFile(path, text, modeOf(path))
	if err != nil {
		return drop, fmt.Errorf("containerd's configuration: %w", err)
	}
	return drop || mainChanged, nil
}

// RemoveHandler undoes AddHandler and tells whether anything has changed.
func RemoveHandler(root string) (changed bool, err error) {
	if err := os.Remove(filepath.Join(root, containerdDropIn)); err == nil {
		changed = true
	} else if !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	path := filepath.Join(root, containerdConfig)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return changed, nil
	}
	if err != nil {
		return changed, err
	}
	was, err := writeFile(path, []byte(strings.ReplaceAll(string(data), importLine, "")), modeOf(path))
	return changed || was, err
}

func readMain(path string) ([]byte, containerdMain, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, containerdMain{Version: 2}, nil
	}
	if err != nil {
		return nil, containerdMain{}, err
	}
	var m containerdMain
	if err := toml.Unmarshal(text, &m); err != nil {
		return nil, m, fmt.Errorf("%s: %w", path, err)
	}
	if len(text) == 0 {
		m.Version = 2
	}
	return text, m, nil
}

// imported tells whether one of containerd's globs finds our file.
func imported(globs []string) bool {
	return slices.ContainsFunc(globs, func(g string) bool {
		if !filepath.IsAbs(g) {
			g = filepath.Join("/", filepath.Dir(containerdConfig), g)
		}
		ok, err := filepath.Match(g, "/"+containerdDropIn)
		return ok && err == nil
	})
}

// addImport puts the line before everything else: a key after a table's head
// would be the table's.
func addImport(text []byte, version int) []byte {
	if len(text) == 0 {
		return fmt.Appendf(nil, "%sversion = %d\n", importLine, version)
	}
	return append([]byte(importLine), text...)
}

func modeOf(path string) fs.FileMode {
	if info, err := os.Stat(path); err == nil {
		return info.Mode().Perm()
	}
	return 0o644
}
