// SPDX-License-Identifier: Apache-2.0

// Package builder makes the guest's images: the uncompressed kernel of a
// distribution's package and an initial root file system that holds the agent,
// its OCI engine, the packet filter's tool, the kernel modules that they need, and
// nothing else.
package builder

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/kata-v2/kata/images"
	"github.com/kata-v2/kata/images/cpio"
	"github.com/kata-v2/kata/images/kernel"
	"github.com/kata-v2/kata/images/modules"
)

// MaxRoot is the most that the root image may have, in bytes: its size is
// copied and unpacked at every cold start.
const MaxRoot = 16 << 20

// Options say what goes in.
type Options struct {
	// Agent and Engine are the static programs that become /init and /usr/bin/crun.
	Agent, Engine string
	// IPTables is the static program that becomes /usr/bin/iptables and, by the name that
	// it is called by, iptables-save and the like. Without one the agent has no access to
	// the guest's packet filter.
	IPTables string
	// KernelPackage is a directory with an unpacked kernel package, or one that
	// scripts/kernel-build.sh made: boot/vmlinuz-<release> or boot/vmlinux-<release>,
	// lib/modules/<release>, and a file "version" with the package's version.
	KernelPackage string
	// PackageName is the name of that package.
	PackageName string
	// Modules are the wanted kernel modules; nil means modules.Default.
	Modules []modules.Want
	// Version and those of the programs go into the manifest.
	Version, AgentVersion, EngineVersion, IPTablesVersion string
	// Out is the directory for the images; it is made when missing.
	Out string
}

// Build writes kernel, root image and manifest into o.Out. Equal inputs give
// equal files. A file whose content did not change is not touched, and the
// manifest comes last.
func Build(o Options) (*images.Manifest, error) {
	kernelPath, release, err := findKernel(o.KernelPackage)
	if err != nil {
		return nil, err
	}
	packageVersion, err := os.ReadFile(filepath.Join(o.KernelPackage, "version"))
	if err != nil {
		return nil, fmt.Errorf("kernel package version: %w", err)
	}
	if err := os.MkdirAll(o.Out, 0o755); err != nil {
		return nil, fmt.Errorf("output directory: %w", err)
	}
	if err := writeKernel(o, kernelPath); err != nil {
		return nil, err
	}
	entries, err := Root(o, release)
	if err != nil {
		return nil, err
	}
	size, err := writeFile(filepath.Join(o.Out, images.InitrdFile), func(w io.Writer) error { return cpio.Write(w, entries) })
	if err != nil {
		return nil, err
	}
	if size > MaxRoot {
		return nil, fmt.Errorf("root image has %d bytes: at most %d are allowed; its largest files are %s", size, MaxRoot, largest(entries))
	}
	m := &images.Manifest{
		Version:     o.Version,
		CreatedFrom: map[string]string{"agent": o.AgentVersion, "crun": o.EngineVersion},
		Kernel:      images.Kernel{Package: o.PackageName, Version: strings.TrimSpace(string(packageVersion)), Release: release},
	}
	if o.IPTables != "" {
		m.CreatedFrom["iptables"] = o.IPTablesVersion
	}
	for _, name := range []string{images.KernelFile, images.InitrdFile} {
		f, err := images.Describe(filepath.Join(o.Out, name))
		if err != nil {
			return nil, err
		}
		m.Files = append(m.Files, f)
	}
	return m, m.Write(filepath.Join(o.Out, images.ManifestFile))
}

// findKernel returns the path and the release of the package's one kernel.
func findKernel(pkg string) (path, release string, err error) {
	found, err := filepath.Glob(filepath.Join(pkg, "boot", "vmlinu[xz]-*"))
	if err != nil {
		return "", "", fmt.Errorf("kernel package %s: %w", pkg, err)
	}
	if len(found) != 1 {
		return "", "", fmt.Errorf("kernel package %s holds %d kernels (boot/vmlinuz-* or boot/vmlinux-*): want one", pkg, len(found))
	}
	_, release, _ = strings.Cut(filepath.Base(found[0]), "-")
	return found[0], release, nil
}

func writeKernel(o Options, path string) error {
	packed, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("kernel: %w", err)
	}
	vmlinux, err := kernel.Extract(packed)
	if err != nil {
		return err
	}
	_, err = writeFile(filepath.Join(o.Out, images.KernelFile), func(w io.Writer) error {
		_, err := w.Write(vmlinux)
		return err
	})
	return err
}

// Root lists the entries of the guest's root file system.
func Root(o Options, release string) ([]cpio.Entry, error) {
	agent, err := os.ReadFile(o.Agent)
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	engine, err := os.ReadFile(o.Engine)
	if err != nil {
		return nil, fmt.Errorf("OCI engine: %w", err)
	}
	entries := []cpio.Entry{
		cpio.File("init", 0o755, agent),
		cpio.File("usr/bin/crun", 0o755, engine),
		cpio.Symlink("bin", "usr/bin"), cpio.Symlink("sbin", "usr/bin"),
		cpio.Symlink("var/run", "../run"),
		cpio.Dir("tmp", 0o1777), cpio.Dir("root", 0o700),
		// The kernel opens it for the first process, before anything is mounted.
		cpio.CharDevice("dev/console", 0o600, 5, 1),
		cpio.File("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n")),
		cpio.File("etc/group", 0o644, []byte("root:x:0:\nnogroup:x:65534:\n")),
	}
	for _, dir := range []string{"proc", "sys", "run"} {
		entries = append(entries, cpio.Dir(dir, 0o755))
	}
	if o.IPTables != "" {
		tool, err := os.ReadFile(o.IPTables)
		if err != nil {
			return nil, fmt.Errorf("iptables: %w", err)
		}
		entries = append(entries, cpio.File("usr/bin/iptables", 0o755, tool))
		for _, name := range toolNames {
			entries = append(entries, cpio.Symlink("usr/bin/"+name, "iptables"))
		}
	}
	wants := o.Modules
	if wants == nil {
		wants = modules.Default
	}
	picked, err := modules.Pick(filepath.Join(o.KernelPackage, "lib", "modules", release), wants)
	if err != nil {
		return nil, err
	}
	for _, m := range picked {
		entries = append(entries, cpio.File(modules.Dir+"/"+m.File, 0o644, m.Data))
	}
	aliases, err := modules.Aliases(picked)
	if err != nil {
		return nil, err
	}
	return append(entries, cpio.File(modules.Dir+"/order", 0o644, modules.Order(picked)),
		cpio.File(modules.Dir+"/alias", 0o644, aliases),
		// The kernel asks for modules by it, when the agent lets it (guest-agent/boot, OnDemand).
		cpio.Symlink("usr/bin/kata-modprobe", "/init")), nil
}

// toolNames are what the packet filter's tool is called by, beside its own name.
var toolNames = []string{"iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"}

// writeFile writes beside the target and renames, so that a running VM keeps the
// file that it started with; equal content leaves the target and its times alone.
func writeFile(path string, write func(io.Writer) error) (size int64, err error) {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return 0, fmt.Errorf("images: %w", err)
	}
	defer os.Remove(tmp.Name())
	if err := errors.Join(write(tmp), tmp.Chmod(0o644), tmp.Close()); err != nil {
		return 0, fmt.Errorf("images: write %s: %w", path, err)
	}
	made, err := images.Describe(tmp.Name())
	if err != nil {
		return 0, err
	}
	if old, err := images.Describe(path); err == nil && old.SHA256 == made.SHA256 {
		return made.Size, nil
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return 0, fmt.Errorf("images: %w", err)
	}
	return made.Size, nil
}

// largest names the three largest files, for the error about the size.
func largest(entries []cpio.Entry) string {
	sizes := make([]string, 0, len(entries))
	for range 3 {
		best := -1
		for i, e := range entries {
			if best < 0 || len(e.Data) > len(entries[best].Data) {
				best = i
			}
		}
		sizes = append(sizes, fmt.Sprintf("%s (%d)", entries[best].Name, len(entries[best].Data)))
		entries = append(append([]cpio.Entry(nil), entries[:best]...), entries[best+1:]...)
	}
	return strings.Join(sizes, ", ")
}
