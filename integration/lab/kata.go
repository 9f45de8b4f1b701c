// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"github.com/kata-v2/kata/images"
	"github.com/kata-v2/kata/integration/lab/leak"
)

// Kata is the shim's configuration for a lab: the guest's images, pods in a
// directory of the lab's own, KVM where it works, and what a test wants to differ.
type Kata struct {
	// Images is the directory with kernel, root image and manifest.
	Images string
	// Set replaces or adds keys: "section.key" → TOML value, as in
	// "hypervisor.qemu.kernel" → `"/nowhere"`. An empty value takes a key out.
	Set map[string]string
}

// EnvTemplate, when set, names a directory of templates, from which the pods of
// every lab then start. A lab makes the one that its pods need.
const EnvTemplate = leak.EnvTemplate

// makeTemplate makes the template of the lab's configuration, for EnvTemplate.
func (c *Containerd) makeTemplate(ctx context.Context) error {
	if os.Getenv(EnvTemplate) == "" || c.opts.ShimDir == "" || c.opts.Kata == nil {
		return nil
	}
	if _, err := os.Stat(filepath.Join(c.opts.ShimDir, "kata-ctl")); errors.Is(err, os.ErrNotExist) {
		return nil // a shim alone: its first pod has it made
	}
	if out, err := c.KataCtl(ctx, "template", "init"); err != nil {
		return fmt.Errorf("lab: make a template: %w: %s", err, out)
	}
	return nil
}

// KataCtl runs kata-ctl, from beside the shim, with the lab's configuration and
// returns what it prints.
func (c *Containerd) KataCtl(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(c.opts.ShimDir, "kata-ctl"), append([]string{"--config", c.ConfigFile()}, args...)...)
	cmd.Env = append(os.Environ(), rootEnv+"="+c.Root)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// TemplatesDir is where the shims of this lab keep their templates.
func (c *Containerd) TemplatesDir() string { return filepath.Join(c.Root, "templates") }

// PodsDir is where the shims of this lab keep their pods (state_dir), when Kata is set.
func (c *Containerd) PodsDir() string { return filepath.Join(c.Root, "pods") }

// ConfigFile is the shim's configuration file, empty when there is none.
func (c *Containerd) ConfigFile() string { return c.opts.ConfigFile }

func (c *Containerd) kataConfigFile() string { return filepath.Join(c.Root, "kata.toml") }

func (c *Containerd) writeKataConfig(k Kata) (string, error) {
	path := c.kataConfigFile()
	if err := os.WriteFile(path, []byte(k.toml(c.PodsDir())), 0o600); err != nil {
		return "", fmt.Errorf("lab: shim configuration: %w", err)
	}
	return path, nil
}

func (k Kata) toml(pods string) string {
	values := map[string]string{
		"hypervisor.qemu.kernel":      quote(filepath.Join(k.Images, images.KernelFile)),
		"hypervisor.qemu.initrd":      quote(filepath.Join(k.Images, images.InitrdFile)),
		"hypervisor.qemu.manifest":    quote(filepath.Join(k.Images, images.ManifestFile)),
		"hypervisor.qemu.accelerator": quote("auto"),
		"runtime.state_dir":           quote(pods),
		"factory.enable_template":     "false", // what is tested then does not depend on what ran before
		"factory.template_path":       quote(filepath.Join(filepath.Dir(pods), "templates")),
		// Without KVM, with all cores taken by other pods, a start takes many times
		// as long as on a machine that pods are meant for.
		"agent.kata.launch_process_timeout": "60",
	}
	if dir := os.Getenv(EnvTemplate); dir != "" {
		values["factory.enable_template"] = "true"
		values["factory.template_path"] = quote(dir)
	}
	for key, v := range k.Set {
		values[key] = v
	}
	sections := map[string][]string{}
	for key, v := range values {
		dot := strings.LastIndex(key, ".")
		if v == "" || dot < 0 {
			continue
		}
		sections[key[:dot]] = append(sections[key[:dot]], key[dot+1:]+" = "+v)
	}
	names := make([]string, 0, len(sections))
	for name := range sections {
		names = append(names, name)
	}
	sort.Strings(names)
	var b strings.Builder
	for _, name := range names {
		sort.Strings(sections[name])
		fmt.Fprintf(&b, "[%s]\n%s\n\n", name, strings.Join(sections[name], "\n"))
	}
	return b.String()
}

// quote writes a TOML basic string; paths of a lab hold no control characters.
func quote(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}

// leftPods names the pods' directories that the shims left in PodsDir. Files and
// directories whose name begins with a dot belong to no pod: what the shims
// remember from one pod to the next.
func (c *Containerd) leftPods() error {
	entries, err := os.ReadDir(c.PodsDir())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") {
			errs = append(errs, fmt.Errorf("pod directory %s was left", filepath.Join(c.PodsDir(), e.Name())))
		}
	}
	return errors.Join(errs...)
}

// startedMessage is the shim's log line for a started container; its fields that
// begin with t_ are the parts of the start.
const startedMessage = `msg="container started"`

// Phase is one part of a container's start.
type Phase struct {
	Name string // as logged, "t_boot"
	Time time.Duration
}

// Started tells whether a log line is the shim's about a started container.
func Started(line string) bool { return strings.Contains(line, startedMessage) }

// Phases reads the t_ fields of such a line, in the order of the line; a value is
// a Go duration, or a number of milliseconds.
func Phases(line string) ([]Phase, error) {
	var phases []Phase
	for _, field := range strings.Fields(line) {
		name, value, ok := strings.Cut(field, "=")
		if !ok || !strings.HasPrefix(name, "t_") {
			continue
		}
		value = strings.Trim(value, `"`)
		d, err := time.ParseDuration(value)
		if err != nil {
			if d, err = time.ParseDuration(value + "ms"); err != nil {
				return nil, fmt.Errorf("lab: phase %s has the value %q: want a duration", name, value)
			}
		}
		phases = append(phases, Phase{name, d})
	}
	if len(phases) == 0 {
		return nil, fmt.Errorf("lab: no phases (fields t_…) in the shim's line %q", line)
	}
	return phases, nil
}
