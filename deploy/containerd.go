// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"bytes"
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
// RemoveHandler knows it by its comment. It is the default of containerd 2.2 and
// later, which a list of ours alone would replace, with all that others have put
// there. A relative path is one from the main file's directory (containerd
// cmd/containerd/server/config, resolveImports).
const importLine = `imports = ["conf.d/*.toml"] # kata` + "\n"

// oldImportLine is what earlier builds have added.
const oldImportLine = `imports = ["conf.d/kata.toml"] # kata` + "\n"

// What encloses the handler in a configuration of version 2.
const (
	blockBegin = "# kata: begin\n"
	blockEnd   = "# kata: end\n"
)

// containerdMain is what is read of containerd's main configuration file.
type containerdMain struct {
	Version int      `toml:"version"`
	Imports []string `toml:"imports"`
}

// AddHandler adds the runtime handler "kata" to containerd's configuration below
// root and tells whether anything has changed: then containerd is to be restarted.
// In version 3 it is a drop-in, which the main file imports. In version 2 it is a
// block at the end of the main file: containerd 1.6 and 1.7 replace the whole
// configuration of the CRI by that of an imported file, so that a drop-in would
// take away the pause image and runc's options. A main file that is missing is
// made, in version 2, which every containerd reads.
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
	if main.Version == 2 {
		return addBlock(root, text, handler)
	}
	if bytes.Contains(text, []byte(oldImportLine)) {
		text, main.Imports = withoutOurs(text), nil
	}
	if !imported(main.Imports) {
		if main.Imports != nil {
			return false, fmt.Errorf("%s: imports does not cover /%s: add that path to it", path, containerdDropIn)
		}
		// First of all: a key after a table's head would be the table's.
		text = append([]byte(importLine), text...)
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

// addBlock puts the handler at the end of a main file of version 2, in place of
// what an earlier install has put anywhere.
func addBlock(root string, text, handler []byte) (changed bool, err error) {
	path := filepath.Join(root, containerdConfig)
	_, handler, _ = bytes.Cut(handler, []byte("version = 2\n")) // the main file has its own
	text = withoutOurs(text)
	if len(text) == 0 {
		text = []byte("version = 2\n")
	}
	if text[len(text)-1] != '\n' {
		text = append(text, '\n')
	}
	text = slices.Concat(text, []byte(blockBegin), bytes.TrimLeft(handler, "\n"), []byte(blockEnd))
	if err := toml.Unmarshal(text, &map[string]any{}); err != nil {
		return false, fmt.Errorf("%s with the handler kata: %w (remove a handler of that name that somebody else has added)", path, err)
	}
	changed, err = removeDropIn(root)
	if err != nil {
		return changed, err
	}
	did, err := writeFile(path, text, modeOf(path))
	if err != nil {
		return changed, fmt.Errorf("containerd's configuration: %w", err)
	}
	return changed || did, nil
}

// withoutOurs is a main file without what AddHandler writes into it.
func withoutOurs(text []byte) []byte {
	s := strings.NewReplacer(importLine, "", oldImportLine, "").Replace(string(text))
	if before, rest, found := strings.Cut(s, blockBegin); found {
		if _, after, found := strings.Cut(rest, blockEnd); found {
			s = before + after
		}
	}
	return []byte(s)
}

func removeDropIn(root string) (changed bool, err error) {
	err = os.Remove(filepath.Join(root, containerdDropIn))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// RemoveHandler undoes AddHandler and tells whether anything has changed.
func RemoveHandler(root string) (changed bool, err error) {
	if changed, err = removeDropIn(root); err != nil {
		return changed, err
	}
	path := filepath.Join(root, containerdConfig)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return changed, nil
	}
	if err != nil {
		return changed, err
	}
	was, err := writeFile(path, withoutOurs(data), modeOf(path))
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

func modeOf(path string) fs.FileMode {
	if info, err := os.Stat(path); err == nil {
		return info.Mode().Perm()
	}
	return 0o644
}
