// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/images"
	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/internal/version"
)

// Env is what "kata-ctl env" prints.
type Env struct {
	Build version.Info `json:"build"`
	Host  EnvHost      `json:"host"`
	// Paths and Versions are of what a pod would use, by name; a file that is
	// not there has its path and no version.
	Paths    map[string]string `json:"paths"`
	Versions map[string]string `json:"versions"`
	// ConfigFiles are the files read, in order; none means built-in defaults.
	ConfigFiles []string         `json:"config_files"`
	Warnings    []string         `json:"warnings"`
	Config      []config.Setting `json:"config"`
}

// EnvHost describes the machine.
type EnvHost struct {
	Kernel string `json:"kernel"`
	Arch   string `json:"arch"`
	CPUs   int    `json:"cpus"`
}

func (o *options) env(ctx context.Context, w io.Writer) error {
	c, warnings, err := o.load()
	if err != nil {
		return err
	}
	e := Env{
		Build:       version.Get(),
		Host:        EnvHost{Arch: runtime.GOARCH, CPUs: runtime.NumCPU()},
		Paths:       map[string]string{"qemu": c.QEMU.Path, "kernel": c.QEMU.Kernel, "state_dir": c.Runtime.StateDir},
		Versions:    map[string]string{},
		ConfigFiles: append([]string{}, c.Files()...),
		Warnings:    []string{},
		Config:      c.Settings(),
	}
	for _, wn := range warnings {
		e.Warnings = append(e.Warnings, wn.String())
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	e.Host.Kernel = unix.ByteSliceToString(u.Release[:])
	o.findPaths(ctx, c, &e)
	if o.json {
		return printJSON(w, e)
	}
	e.print(w)
	return nil
}

func (o *options) findPaths(ctx context.Context, c *config.Config, e *Env) {
	add := func(name, path string) {
		if path != "" {
			e.Paths[name] = path
		}
	}
	add("initrd", c.QEMU.Initrd)
	add("image", c.QEMU.Image)
	add("manifest", c.ManifestPath())
	if p, err := c.Virtiofsd(); err == nil {
		add("virtiofsd", p)
	}
	if p, err := o.host.lookPath(ShimName); err == nil {
		add("shim", p)
	}
	for _, name := range []string{"qemu", "virtiofsd"} {
		if p := e.Paths[name]; p != "" {
			if line, err := programVersion(ctx, p); err == nil {
				e.Versions[name] = line
			}
		}
	}
	if p := e.Paths["manifest"]; p != "" {
		if m, err := images.ReadManifest(p); err == nil {
			e.Versions["images"], e.Versions["guest_kernel"] = m.Version, m.Kernel.Release
		}
	}
}

func (e Env) print(w io.Writer) {
	fmt.Fprintf(w, "%s\nhost kernel %s, %s, %d CPUs\n\n", e.Build, e.Host.Kernel, e.Host.Arch, e.Host.CPUs)
	for _, name := range []string{"shim", "qemu", "virtiofsd", "kernel", "initrd", "image", "manifest", "state_dir"} {
		if p, known := e.Paths[name]; known {
			line := fmt.Sprintf("%-10s %s", name, p)
			if v := e.Versions[name]; v != "" {
				line += "  (" + v + ")"
			}
			fmt.Fprintln(w, line)
		}
	}
	for _, name := range []string{"images", "guest_kernel"} {
		if v := e.Versions[name]; v != "" {
			fmt.Fprintf(w, "%-10s %s\n", strings.ReplaceAll(name, "_", " "), v)
		}
	}
	for _, wn := range e.Warnings {
		fmt.Fprintln(w, "warning:", wn)
	}
	section := ""
	for _, s := range e.Config {
		if s.Section != section {
			section = s.Section
			fmt.Fprintf(w, "\n[%s]\n", section)
		}
		fmt.Fprintf(w, "%s = %s  # %s\n", s.Key, tomlValue(s.Value), s.Origin)
	}
}

// tomlValue writes a value as the configuration file does.
func tomlValue(v any) string {
	switch x := v.(type) {
	case string:
		return fmt.Sprintf("%q", x)
	case []string:
		q := make([]string, len(x))
		for i, s := range x {
			q[i] = fmt.Sprintf("%q", s)
		}
		return "[" + strings.Join(q, ", ") + "]"
	}
	return fmt.Sprint(v)
}
