// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// ModuleDir is where the image keeps kernel modules, uncompressed, and the file
// "order": one line a module, "<group> <file.ko> [params]", dependencies first.
const ModuleDir = "/lib/modules/kata"

// Groups of modules, by when they are loaded.
const (
	GroupBoot   = "boot"   // before serving: vsock and what carries it
	GroupFS     = "fs"     // when a file system of that type is mounted: fuse, virtiofs, overlay
	GroupNet    = "net"    // before the first interface is configured
	GroupBlock  = "blk"    // before the first block device is looked for
	GroupSerial = "serial" // before the channel of a machine without vsock
	GroupExtra  = "extra"  // only by name
)

type module struct{ file, params string }

// Modules loads the image's kernel modules, each group at most once.
type Modules struct {
	dir    string
	load   func(path, params string) error
	groups map[string][]module // read-only after OpenModules
	once   map[string]func() error
	mu     sync.Mutex // serialises loads by name

	demand    sync.Once // OnDemand
	demandErr error
}

// OpenModules reads dir/order. Without that file everything is built into the
// kernel and every group is empty.
func OpenModules(dir string) (*Modules, error) {
	return openModules(dir, finit)
}

func openModules(dir string, load func(path, params string) error) (*Modules, error) {
	m := &Modules{dir: dir, load: load, groups: map[string][]module{}, once: map[string]func() error{}}
	b, err := os.ReadFile(filepath.Join(dir, "order"))
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	}
	if err != nil {
		return m, fmt.Errorf("module order: %w", err)
	}
	for i, line := range strings.Split(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		if len(f) < 2 || strings.Contains(f[1], "/") {
			return m, fmt.Errorf("module order, line %d: %q: want <group> <file.ko> [params]", i+1, line)
		}
		m.groups[f[0]] = append(m.groups[f[0]], module{file: f[1], params: strings.Join(f[2:], " ")})
	}
	for g := range m.groups {
		m.once[g] = sync.OnceValue(func() error { return m.loadGroup(g) })
	}
	return m, nil
}

// None says that the image has no modules: the kernel has everything built in.
func (m *Modules) None() bool { return len(m.groups) == 0 }

// Ensure loads a group; a second call waits for the first and answers the same.
func (m *Modules) Ensure(group string) error {
	if f, ok := m.once[group]; ok {
		return f()
	}
	return nil
}

func (m *Modules) loadGroup(group string) error {
	for _, mod := range m.groups[group] {
		if err := m.load(filepath.Join(m.dir, mod.file), mod.params); err != nil {
			return fmt.Errorf("load module %s (group %s): %w", mod.file, group, err)
		}
	}
	return nil
}

// EnsureFS makes the kernel know a file system type: its module has the type's
// name. Only that one and what it depends on are loaded, since on a slow machine
// each takes tens of milliseconds. A type that the image has no module for is
// left to mount(2) to refuse.
func (m *Modules) EnsureFS(fstype string) error {
	if m.None() {
		return nil
	}
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return fmt.Errorf("file system %s: %w", fstype, err)
	}
	// Lines are "nodev\ttype" or "\ttype".
	if bytes.Contains(known, []byte("\t"+fstype+"\n")) {
		return nil
	}
	if _, ok := m.find(normal(fstype)); !ok {
		return nil
	}
	return m.LoadByName(fstype, nil)
}

// EnsureModule makes sure that a module is loaded, for a kernel that has it as
// one: a name that the image does not have is taken to be built into the kernel.
func (m *Modules) EnsureModule(name string) error {
	if _, ok := m.find(normal(name)); !ok {
		return nil
	}
	return m.LoadByName(name, nil)
}

// LoadByName loads one module of the image and, first, what it depends on by its
// own account (the "depends" entry of its .modinfo section). A name that the
// image does not have is fine when the kernel has it loaded or built in.
func (m *Modules) LoadByName(name string, params []string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.loadNamed(name, strings.Join(params, " "), 0)
}

// maxDepth bounds a chain of dependencies; a real one has a handful.
const maxDepth = 16

func (m *Modules) loadNamed(name, params string, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("module %s: dependencies nest deeper than %d", name, maxDepth)
	}
	name = normal(name)
	if _, err := os.Stat(filepath.Join("/sys/module", name)); err == nil {
		return nil
	}
	file, ok := m.find(name)
	if !ok {
		return fmt.Errorf("module %s: neither in %s nor in the kernel: add it to the guest image", name, m.dir)
	}
	path := filepath.Join(m.dir, file)
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("module %s: %w", name, err)
	}
	for _, dep := range depends(b) {
		if err := m.loadNamed(dep, "", depth+1); err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
	}
	if err := m.load(path, params); err != nil {
		return fmt.Errorf("module %s: %w", name, err)
	}
	return nil
}

func (m *Modules) find(name string) (string, bool) {
	for _, mods := range m.groups {
		for _, mod := range mods {
			if base, _, _ := strings.Cut(mod.file, ".ko"); normal(base) == name {
				return mod.file, true
			}
		}
	}
	return "", false
}

func normal(name string) string { return strings.ReplaceAll(name, "-", "_") }

// depends reads the comma-separated list of a module's "depends=" entry.
func depends(ko []byte) []string {
	const key = "\x00depends="
	i := bytes.Index(ko, []byte(key))
	if i < 0 {
		return nil
	}
	val := ko[i+len(key):]
	end := bytes.IndexByte(val, 0)
	if end <= 0 {
		return nil
	}
	return strings.Split(string(val[:end]), ",")
}

// finit loads the file at path; a module that is loaded already is fine.
func finit(path, params string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), params, 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}
