// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/images"
)

// learn starts one pod, discarded, and reads from it what the probes need: the
// command line of its QEMU and the names of the start's parts.
func (e *Env) learn(ctx context.Context) error {
	var product []string
	err := e.withContainer(ctx, Kata, Row{}, func(Row, float64) {}, func(id string) error {
		p, err := e.processes(id, Kata)
		if err != nil {
			return err
		}
		if product = cmdline(p.vmm); len(product) == 0 {
			return fmt.Errorf("QEMU, process %d, ended early", p.vmm)
		}
		phases, err := e.startPhases(ctx, id)
		for _, p := range phases {
			e.phases = append(e.phases, p.Name)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("bench: the first pod: %w", err)
	}
	if err := e.prepareBare(product); err != nil {
		return err
	}
	return e.collectFacts(ctx)
}

// collectFacts describes what the figures depend on.
func (e *Env) collectFacts(ctx context.Context) error {
	m, err := images.ReadManifest(filepath.Join(e.o.Images, images.ManifestFile))
	if err != nil {
		return err
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("bench: uname: %w", err)
	}
	version, err := exec.CommandContext(ctx, e.qemuPath, "--version").Output()
	if err != nil {
		return fmt.Errorf("bench: version of %s: %w", e.qemuPath, err)
	}
	qemu, _, _ := strings.Cut(string(version), "\n")
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return fmt.Errorf("bench: load: %w", err)
	}
	average, _, _ := strings.Cut(string(load), " ")
	programs, err := digests(filepath.Join(e.o.Bin, shimFile), filepath.Join(e.o.Images, images.InitrdFile), filepath.Join(e.o.Images, images.KernelFile))
	if err != nil {
		return err
	}
	e.facts = []Fact{
		{"host", fmt.Sprintf("%d cores, kernel %s, load %s before", runtime.NumCPU(), unix.ByteSliceToString(u.Release[:]), average)},
		{"guest kernel", m.Kernel.Release},
		{factPrograms, programs},
		{"QEMU", qemu},
		{"containerd", e.o.Version + ", snapshotter " + e.o.Snapshotter},
		{"templates", "pod-start, pod-start-4 and -16, pod-further to tcp-out, clone- rows and restore have theirs before they begin; all others boot"},
		{BaseRow, shellLine(append([]string{e.qemuPath}, e.bareArgs...))},
	}
	return nil
}

// digests tells files apart: the first bytes of the SHA-256 of each.
func digests(paths ...string) (string, error) {
	var out []string
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			return "", fmt.Errorf("bench: %w", err)
		}
		sum := sha256.Sum256(b)
		out = append(out, fmt.Sprintf("%s %x", filepath.Base(path), sum[:6]))
	}
	return strings.Join(out, ", "), nil
}

// shellLine writes a command as one types it, files by their names alone: where
// they lie is of this machine.
func shellLine(args []string) string {
	quoted := make([]string, len(args))
	for i, a := range args {
		if filepath.IsAbs(a) {
			a = filepath.Base(a)
		}
		if strings.ContainsAny(a, " '\"$`\\*?;&|<>()") || a == "" {
			a = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
		quoted[i] = a
	}
	return strings.Join(quoted, " ")
}
