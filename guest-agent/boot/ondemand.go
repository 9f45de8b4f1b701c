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
)

// Modprobe is the agent's own program under the name by which the kernel asks for
// modules, once OnDemand has been called.
const Modprobe = "/usr/bin/kata-modprobe"

// modprobeFile is where the kernel looks which program that is
// (Documentation/admin-guide/sysctl/kernel.rst).
const modprobeFile = "/proc/sys/kernel/modprobe"

// filterModules are the packet filter itself. The kernel does not ask for these: it
// has no such socket option, and iptables starts the program, which containers
// have neither the file nor the privilege for.
var filterModules = []string{"ip_tables", "ip6_tables"}

// OnDemand makes the packet filter ready and lets the kernel load the image's
// modules when it needs them, as it does for the parts of a rule. It is not so from
// the start because every question of the kernel is a process, also those for what
// the image does not have; without a program the kernel has its answer at once. A
// kernel without modules and an image without the program are fine.
func (m *Modules) OnDemand() error {
	m.demand.Do(func() {
		if _, err := os.Stat(Modprobe); err != nil || m.None() {
			return
		}
		err := os.WriteFile(modprobeFile, []byte(Modprobe), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			m.demandErr = fmt.Errorf("modules on demand: %w", err)
		}
		for _, name := range filterModules {
			m.demandErr = errors.Join(m.demandErr, m.EnsureModule(name))
		}
	})
	return m.demandErr
}

// ModprobeMain is the program that the kernel starts as "<program> -q -- <name>"
// (kernel/kmod.c, call_modprobe), and iptables as "<program> <name> -q"; it returns
// its exit status.
func ModprobeMain(args []string) int {
	m, err := OpenModules(ModuleDir)
	if err == nil {
		err = m.demanded(args)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kata-modprobe:", err)
		return 1
	}
	return 0
}

// demanded loads what the arguments name, by a module's name or an alias.
func (m *Modules) demanded(args []string) error {
	aliases, err := os.ReadFile(filepath.Join(m.dir, "alias"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, name := range args {
		if strings.HasPrefix(name, "-") {
			continue
		}
		for line := range bytes.Lines(aliases) {
			alias, file, _ := strings.Cut(strings.TrimSpace(string(line)), " ")
			if normal(alias) == normal(name) {
				name, _, _ = strings.Cut(file, ".ko")
				break
			}
		}
		if err := m.LoadByName(name, nil); err != nil {
			return err
		}
	}
	return nil
}
