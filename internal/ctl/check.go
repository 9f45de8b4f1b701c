// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/kata-v2/kata/images"
	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/internal/kvmprobe"
)

// Status of a check. A warning does not keep a pod from starting.
const (
	OK   = "ok"
	Warn = "warn"
	Fail = "fail"
)

// Result is one line of "kata-ctl check"; with --json the command prints an
// array of them.
type Result struct {
	Name   string `json:"name"`
	Status string `json:"status"` // ok, warn or fail
	Detail string `json:"detail"`
	// Fix says what to do; empty when the status is ok.
	Fix string `json:"fix"`
}

func ok(name, format string, a ...any) Result {
	return Result{Name: name, Status: OK, Detail: fmt.Sprintf(format, a...)}
}

// bad is a result that is not ok.
func bad(name, status string, err error, fix string) Result {
	return Result{Name: name, Status: status, Detail: err.Error(), Fix: fix}
}

func (o *options) check(ctx context.Context, w io.Writer) error {
	results := o.results(ctx)
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("check: %w", err)
	}
	if o.json {
		if err := printJSON(w, results); err != nil {
			return err
		}
	} else {
		printResults(w, results)
	}
	for _, r := range results {
		if r.Status == Fail {
			return errFailed
		}
	}
	return nil
}

func printResults(w io.Writer, results []Result) {
	for _, r := range results {
		fmt.Fprintf(w, "%-4s  %-18s %s\n", r.Status, r.Name, r.Detail)
		if r.Fix != "" {
			fmt.Fprintf(w, "%-25sfix: %s\n", "", r.Fix)
		}
	}
}

// results runs every check. When the configuration cannot be read, its defaults
// stand in, so that the rest still says something.
func (o *options) results(ctx context.Context) []Result {
	c, first := o.checkConfig()
	out := append(first,
		o.checkKVM(ctx, c),
		o.checkVsock(c),
		checkDevice("vhost-net", o.host.vhostNet, Warn, "load the module vhost_net; without it the network is slower"),
		checkDevice("tun", o.host.tun, tunStatus(c), "load the module tun; the pods' network devices need it"),
		checkQEMU(ctx, c),
		checkVirtiofsd(ctx, c),
	)
	out = append(out, checkImages(c)...)
	return append(out, o.checkShim(), o.checkRuntime())
}

func (o *options) checkConfig() (*config.Config, []Result) {
	const name = "configuration"
	c, warnings, err := o.load()
	if err != nil {
		d, _, derr := config.Load(config.LoadOptions{Body: []byte{}})
		if derr != nil {
			panic(derr) // the built-in defaults are valid, or no test of config passes
		}
		return d, []Result{bad(name, Fail, err, "correct the file; the checks below use the built-in defaults")}
	}
	from := "built-in defaults"
	if files := c.Files(); len(files) > 0 {
		from = strings.Join(files, ", ")
	}
	out := []Result{ok(name, "%s", from)}
	for _, w := range warnings {
		out = append(out, bad(name, Warn, errors.New(w.String()), "remove the keys, or ignore this"))
	}
	return c, out
}

func (o *options) checkKVM(ctx context.Context, c *config.Config) Result {
	const name = "kvm"
	mode := c.QEMU.Accelerator
	if mode == "tcg" {
		return ok(name, `not needed: accelerator = "tcg" is configured`)
	}
	v, err := kvmprobe.Probe(ctx, o.host.kvm)
	switch {
	case err != nil:
		return bad(name, Fail, err, kvmprobe.Fix)
	case v.Usable:
		return ok(name, "%s, in %v", v.Reason, v.Took.Round(100_000))
	case mode == "auto":
		return bad(name, Warn, errors.New(v.Reason+`; accelerator = "auto" falls back to tcg`), kvmprobe.Fix)
	}
	return bad(name, Fail, errors.New(v.Reason), kvmprobe.Fix)
}

// openDevice opens a device the way its user will.
func openDevice(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

func checkDevice(name, path, status, fix string) Result {
	if err := openDevice(path); err != nil {
		return bad(name, status, err, fix)
	}
	return ok(name, "%s opens", path)
}

func (o *options) checkVsock(c *config.Config) Result {
	const name = "vhost-vsock"
	err := openDevice(o.host.vhostVsock)
	switch {
	case c.QEMU.Vsock == "vhost-user":
		return ok(name, `not needed: vsock = "vhost-user" is configured`)
	case err == nil:
		return ok(name, "%s opens", o.host.vhostVsock)
	case c.QEMU.Vsock == "vhost":
		return bad(name, Fail, err, `load the module vhost_vsock, or set vsock = "auto" in [hypervisor.qemu]`)
	}
	// auto: nothing is missing, only another device is used.
	return ok(name, "%v; the shim's own vhost-user device is used", err)
}

func tunStatus(c *config.Config) string {
	if c.Runtime.InternetworkingModel == "none" {
		return Warn
	}
	return Fail
}

// fileError picks what CheckFiles says about one key.
func fileError(c *config.Config, key string) *config.FileError {
	joined, _ := c.CheckFiles().(interface{ Unwrap() []error })
	if joined == nil {
		return nil
	}
	for _, err := range joined.Unwrap() {
		var fe *config.FileError
		if errors.As(err, &fe) && fe.Key == "hypervisor.qemu."+key {
			return fe
		}
	}
	return nil
}

// missing is the result for a file that cannot be used.
func missing(name string, fe *config.FileError) Result {
	return bad(name, Fail, fmt.Errorf("%s: %w (%s)", fe.Path, fe.Err, fe.Setting()), fe.Fix)
}

func checkQEMU(ctx context.Context, c *config.Config) Result {
	const name = "qemu"
	if fe := fileError(c, "path"); fe != nil {
		return missing(name, fe)
	}
	line, err := programVersion(ctx, c.QEMU.Path)
	if err != nil {
		return bad(name, Fail, err, "install a QEMU that runs on this host")
	}
	new, err := atLeast(line, 7, 2)
	switch {
	case err != nil:
		return bad(name, Warn, err, "make sure that it is QEMU 7.2 or newer")
	case !new:
		return bad(name, Fail, fmt.Errorf("%s: %s is too old", c.QEMU.Path, line), "install QEMU 7.2 or newer")
	}
	return ok(name, "%s: %s", c.QEMU.Path, line)
}

func checkVirtiofsd(ctx context.Context, c *config.Config) Result {
	const name = "virtiofsd"
	if c.QEMU.SharedFS == "none" {
		return ok(name, `not needed: shared_fs = "none" is configured`)
	}
	if fe := fileError(c, "virtio_fs_daemon"); fe != nil {
		return missing(name, fe)
	}
	path, err := c.Virtiofsd()
	if err != nil {
		return bad(name, Fail, err, "")
	}
	line, err := programVersion(ctx, path)
	if err != nil {
		return bad(name, Fail, err, "install a virtiofsd that runs on this host")
	}
	return ok(name, "%s: %s", path, line)
}

// checkImages looks at kernel and guest root, and compares both with the manifest.
func checkImages(c *config.Config) []Result {
	root := "initrd"
	files := map[string]string{"kernel": c.QEMU.Kernel, "initrd": c.QEMU.Initrd}
	if c.QEMU.Image != "" {
		root = "image"
		files = map[string]string{"kernel": c.QEMU.Kernel, "image": c.QEMU.Image}
	}
	var out []Result
	for _, key := range []string{"kernel", root} {
		if fe := fileError(c, key); fe != nil {
			out = append(out, missing(key, fe))
			delete(files, key)
			continue
		}
		out = append(out, ok(key, "%s", files[key]))
	}
	return append(out, checkManifest(c, files))
}

func checkManifest(c *config.Config, files map[string]string) Result {
	const name = "manifest"
	path := c.ManifestPath()
	if path == "" {
		return bad(name, Warn, errors.New("no manifest; kernel and guest root are used without comparing digests"),
			"install manifest.json beside the kernel, or set manifest in [hypervisor.qemu]")
	}
	m, err := images.ReadManifest(path)
	if err != nil {
		return bad(name, Fail, err, "build or install the guest's files again, together")
	}
	for _, f := range files {
		if err := m.VerifyFile(f); err != nil {
			return bad(name, Fail, err, "build or install kernel, guest root and manifest again, together")
		}
	}
	return ok(name, "%s: version %s, guest kernel %s; %d files compared", path, m.Version, m.Kernel.Release, len(files))
}

func (o *options) checkShim() Result {
	const name = "shim"
	path, err := o.host.lookPath(ShimName)
	if err != nil {
		return bad(name, Fail, fmt.Errorf("%s is not in PATH", ShimName), "install it into a directory of containerd's PATH, for example /usr/local/bin")
	}
	return ok(name, "%s", path)
}

// checkRuntime looks for the runtime's entry in containerd's configuration. CRI
// needs one; clients that name the runtime type themselves, such as ctr, do not.
func (o *options) checkRuntime() Result {
	const name = "containerd-runtime"
	path := o.host.containerdConfig
	fix := fmt.Sprintf("for Kubernetes add a runtime with runtime_type = %q to %s", RuntimeType, path)
	f, err := os.Open(path)
	if err != nil {
		return bad(name, Warn, err, fix)
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for n := 1; sc.Scan(); n++ {
		line := strings.TrimSpace(sc.Text())
		if !strings.HasPrefix(line, "#") && strings.Contains(line, RuntimeType) {
			return ok(name, "%s:%d: %s", path, n, line)
		}
	}
	if err := sc.Err(); err != nil {
		return bad(name, Warn, fmt.Errorf("%s: %w", path, err), fix)
	}
	return bad(name, Warn, fmt.Errorf("%s has no runtime of type %s", path, RuntimeType), fix)
}
