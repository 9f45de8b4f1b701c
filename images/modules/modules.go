// SPDX-License-Identifier: Apache-2.0

// Package modules picks the kernel modules that a guest needs out of a
// distribution's kernel package, with their dependencies, in an order in which
// they load.
//
// The guest finds them as /lib/modules/kata/<file>.ko beside the text file
// "order", one line for each module: group, file, and optional parameters,
// separated by blanks; a module stands after everything that it depends on, and
// in the group in which it is needed first. The file "alias" says by which other
// names the kernel asks for them: alias, file.
package modules

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Dir is where the guest finds the modules.
const Dir = "lib/modules/kata"

// Group names when the agent loads its modules.
type Group string

// The groups, in loading order.
const (
	Boot   Group = "boot"   // before the agent serves: virtio over PCI, vsock
	FS     Group = "fs"     // right after it serves: virtio-fs, overlay
	Net    Group = "net"    // before the first interface is set up
	Block  Group = "blk"    // before the first disk is waited for
	Serial Group = "serial" // in place of vsock
	Extra  Group = "extra"  // when something asks for it
)

// Want is one module that the guest shall have.
type Want struct {
	Group Group
	// Name is the module's name; - and _ mean the same.
	Name string
	// Params are given to the module when it is loaded.
	Params string
}

// Default is what the guest of this repository uses. A module that the kernel
// has built in is left out.
var Default = []Want{
	{Boot, "virtio_pci", ""}, {Boot, "vmw_vsock_virtio_transport", ""},
	{FS, "virtiofs", ""}, {FS, "overlay", ""},
	{Net, "virtio_net", ""},
	{Block, "virtio_blk", ""},
	{Serial, "virtio_console", ""},
	{Extra, "virtio_rng", ""}, {Extra, "virtio_balloon", ""}, {Extra, "virtio_mem", ""}, {Extra, "erofs", ""},
	{Extra, "dm_verity", ""},
	// The packet filter: what rules of iptables need that are for services, sidecar
	// proxies and firewalls. Loaded one by one, when the kernel asks for them.
	{Extra, "iptable_filter", ""}, {Extra, "iptable_nat", ""}, {Extra, "iptable_mangle", ""}, {Extra, "iptable_raw", ""},
	{Extra, "ip6table_filter", ""}, {Extra, "ip6table_nat", ""}, {Extra, "ip6table_mangle", ""}, {Extra, "ip6table_raw", ""},
	{Extra, "xt_tcpudp", ""}, {Extra, "xt_conntrack", ""}, {Extra, "xt_state", ""}, {Extra, "xt_addrtype", ""}, {Extra, "xt_comment", ""},
	{Extra, "xt_multiport", ""}, {Extra, "xt_mark", ""}, {Extra, "xt_connmark", ""}, {Extra, "xt_limit", ""}, {Extra, "xt_owner", ""},
	{Extra, "xt_statistic", ""}, {Extra, "xt_recent", ""}, {Extra, "xt_socket", ""},
	{Extra, "xt_nat", ""}, {Extra, "xt_MASQUERADE", ""}, {Extra, "xt_REDIRECT", ""}, {Extra, "xt_TPROXY", ""}, {Extra, "xt_CT", ""},
	{Extra, "xt_TCPMSS", ""}, {Extra, "ipt_REJECT", ""}, {Extra, "ip6t_REJECT", ""}, {Extra, "xt_LOG", ""}, {Extra, "nf_log_syslog", ""},
}

// Module is one module ready for the guest.
type Module struct {
	Group  Group
	File   string // file name, ends in .ko
	Params string
	Data   []byte
}

// Pick reads the wanted modules and their dependencies from root, the
// directory lib/modules/<release> of a kernel package. Compressed modules
// (.ko.xz, .ko.zst, .ko.gz) are unpacked. What the guest does not use – debug
// information, BTF, the signature, the tables of the stack unwinder and of function
// tracing – is stripped: it would cost space in the guest's root and time at every load.
func Pick(root string, wants []Want) ([]Module, error) {
	p := picker{files: map[string]string{}, builtin: map[string]bool{}, done: map[string]bool{}}
	if err := p.index(root); err != nil {
		return nil, fmt.Errorf("modules: %w", err)
	}
	for _, w := range wants {
		if err := p.pick(w, nil); err != nil {
			return nil, fmt.Errorf("modules: %w", err)
		}
	}
	return p.picked, nil
}

// Order is the content of the "order" file.
func Order(list []Module) []byte {
	var b bytes.Buffer
	for _, m := range list {
		b.WriteString(strings.TrimSpace(string(m.Group)+" "+m.File+" "+m.Params) + "\n")
	}
	return b.Bytes()
}

// Aliases is the content of the "alias" file: the names that stand in the modules
// themselves, without the patterns by which hardware is matched.
func Aliases(list []Module) ([]byte, error) {
	var b bytes.Buffer
	for _, m := range list {
		f, err := elf.NewFile(bytes.NewReader(m.Data))
		if err != nil {
			return nil, fmt.Errorf("modules: %s: %w", m.File, err)
		}
		names, err := info(f, "alias")
		if err != nil {
			return nil, fmt.Errorf("modules: %s: %w", m.File, err)
		}
		for _, name := range names {
			if !strings.ContainsAny(name, "*?[ ") {
				b.WriteString(name + " " + m.File + "\n")
			}
		}
	}
	return b.Bytes(), nil
}

type picker struct {
	files   map[string]string // name → path
	builtin map[string]bool
	done    map[string]bool
	picked  []Module
}

// key makes - and _ equal, as the kernel does.
func key(name string) string { return strings.ReplaceAll(name, "-", "_") }

// moduleName is the key of a module's file name, and false for other files.
func moduleName(file string) (string, bool) {
	base, _, found := strings.Cut(filepath.Base(file), ".ko")
	return key(base), found
}

func (p *picker) index(root string) error {
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name, ok := moduleName(path); ok && d.Type().IsRegular() {
			p.files[name] = path
		}
		return nil
	})
	if err != nil {
		return err
	}
	list, err := os.ReadFile(filepath.Join(root, "modules.builtin"))
	if err != nil {
		return fmt.Errorf("%s does not look like lib/modules/<release> of a kernel package: %w", root, err)
	}
	for line := range strings.Lines(string(list)) {
		if name, ok := moduleName(strings.TrimSpace(line)); ok {
			p.builtin[name] = true
		}
	}
	return nil
}

// pick adds a module after its dependencies; chain is how it was reached.
func (p *picker) pick(w Want, chain []string) error {
	name := key(w.Name)
	if p.done[name] || p.builtin[name] {
		return nil
	}
	for _, c := range chain {
		if c == name {
			return fmt.Errorf("%s depends on itself: %s", name, strings.Join(chain, " → "))
		}
	}
	path, ok := p.files[name]
	if !ok {
		return fmt.Errorf("%s is neither a module of this kernel nor built in (wanted by: %s)", name, strings.Join(append(chain, "the list"), ", "))
	}
	data, err := read(path)
	if err != nil {
		return err
	}
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	depends, err := dependencies(f)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	for _, d := range depends {
		if err := p.pick(Want{Group: w.Group, Name: d}, append(chain, name)); err != nil {
			return err
		}
	}
	// Kernel functions that a module offers to BPF are described by its BTF:
	// without it such a module refuses to load.
	keepBTF := f.Section(".BTF_ids") != nil
	if data, err = strip(data, keepBTF); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	p.done[name] = true
	p.picked = append(p.picked, Module{Group: w.Group, File: name + ".ko", Params: w.Params, Data: data})
	return nil
}

// read returns a module's ELF file, unpacked when its name says so.
func read(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	tools := map[string]string{".xz": "xz", ".zst": "zstd", ".gz": "gzip"}
	tool, packed := tools[filepath.Ext(path)]
	if !packed {
		return data, nil
	}
	cmd := exec.Command(tool, "-dc")
	cmd.Stdin = bytes.NewReader(data)
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("unpack %s: %w", path, err)
	}
	return out, nil
}

// dependencies are the modules that "depends" names, which the kernel's build
// writes; a package that was never installed has no modules.dep.
func dependencies(f *elf.File) ([]string, error) {
	lists, err := info(f, "depends")
	if err != nil || len(lists) == 0 {
		return nil, err
	}
	return strings.FieldsFunc(lists[0], func(r rune) bool { return r == ',' }), nil
}

// info reads the values of a key of the module's .modinfo section.
func info(f *elf.File, key string) (values []string, err error) {
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("no .modinfo section: not a kernel module")
	}
	data, err := section.Data()
	if err != nil {
		return nil, err
	}
	for _, field := range bytes.Split(data, []byte{0}) {
		if value, ok := bytes.CutPrefix(field, []byte(key+"=")); ok {
			values = append(values, string(value))
		}
	}
	return values, nil
}
