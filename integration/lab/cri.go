// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/internal/spawn"
)

// The runtime handlers of a lab with Options.CRI.
const (
	// HandlerSandbox is the shim with sandboxer = "shim": pods through the
	// Sandbox API, without a pause container. Only containerd 2 has it.
	HandlerSandbox = "kata"
	// HandlerPause is the shim with a pause container.
	HandlerPause = "kata-pause"
	// HandlerRunc is runc, to compare with.
	HandlerRunc = "runc"
)

// PauseImage is the image of pause containers: busybox's shell, which reaps what
// is left to it and ends on TERM.
const PauseImage = "localhost/kata/pause:1"

// HostAddress is an address of the lab's own "host" that is neither loopback nor
// on a bridge, for host ports (RFC 5737, TEST-NET-1).
const HostAddress = "192.0.2.1"

// PodSubnet is what the lab's CNI bridge hands out addresses of.
const PodSubnet = "10.88.77.0/24"

// cniPlugins is where Debian's containernetworking-plugins are.
const cniPlugins = "/usr/lib/cni"

// cniCache is where libcni keeps the results of live pods; it cannot be moved.
const cniCache = "/var/lib/cni"

// criNamespace is containerd's namespace for the CRI.
const criNamespace = "k8s.io"

// hostNet is a network namespace that the daemon, its shims and the CNI plugins
// take for the host's: bridge, addresses and NAT rules end with it. It lives as
// long as the thread that is in it and the processes that the thread started.
type hostNet struct{ thread *spawn.Thread }

func newHostNet() (*hostNet, error) {
	n := &hostNet{thread: spawn.NewThread()}
	err := n.thread.EnterNetNS("")
	if err == nil {
		err = n.thread.Do(func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			addr, err := netlink.ParseAddr(HostAddress + "/32")
			if err != nil {
				return err
			}
			return errors.Join(netlink.LinkSetUp(lo), netlink.AddrAdd(lo, addr))
		})
	}
	if err != nil {
		n.thread.Close()
		return nil, fmt.Errorf("lab: network: %w", err)
	}
	return n, nil
}

// InHostNet runs f on a thread in the network that the lab's daemon takes for the
// host's; sockets made by f stay in it. It needs Options.CRI.
func (c *Containerd) InHostNet(f func() error) error { return c.net.thread.Do(f) }

// Endpoint is the daemon's socket in the form that CRI clients take.
func (c *Containerd) Endpoint() string { return "unix://" + c.Address }

func (c *Containerd) cniDir() string { return filepath.Join(c.Root, "cni") }

// cniName is the network's name, one for each lab: CNI keeps all results in one place.
func (c *Containerd) cniName() string { return filepath.Base(c.Root) }

// cniResults matches the results that CNI keeps of this lab's live pods.
func (c *Containerd) cniResults() string { return filepath.Join(cniCache, "results", c.cniName()+"-*") }

// CNIState matches what CNI keeps of this lab's live pods: addresses and results.
func (c *Containerd) CNIState() []string {
	return []string{filepath.Join(c.cniDir(), "ipam", c.cniName()+"*", "[0-9]*"), c.cniResults()}
}

// cniPrograms is where the scripts of Options.Plugins are.
func (c *Containerd) cniPrograms() string { return filepath.Join(c.cniDir(), "bin") }

// networkDir holds the configuration of one of Options.Networks.
func (c *Containerd) networkDir(name string) string { return filepath.Join(c.cniDir(), "net-"+name) }

// writeNetworks writes what Options.Networks and Options.Plugins describe.
func (c *Containerd) writeNetworks() error {
	files := map[string]string{}
	for name, plugins := range c.opts.Networks {
		plugins = strings.ReplaceAll(plugins, "@DATA@", filepath.Join(c.cniDir(), "ipam"))
		files[filepath.Join(c.networkDir(name), "10.conflist")] = fmt.Sprintf("{\"cniVersion\": \"1.0.0\", \"name\": %q, \"plugins\": [%s]}\n", c.cniName()+"-"+name, plugins)
	}
	for name, script := range c.opts.Plugins {
		files[filepath.Join(c.cniPrograms(), name)] = script
	}
	for path, text := range files {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return fmt.Errorf("lab: network: %w", err)
		}
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			return fmt.Errorf("lab: network: %w", err)
		}
	}
	return nil
}

// prepareCRI makes the lab's network and writes its CNI configuration.
func (c *Containerd) prepareCRI() (err error) {
	if _, err := os.Stat(filepath.Join(cniPlugins, "bridge")); err != nil {
		return fmt.Errorf("lab: CNI plugins: run scripts/setup.sh first: %w", err)
	}
	if err := os.MkdirAll(c.cniDir(), 0o755); err != nil {
		return fmt.Errorf("lab: CNI configuration: %w", err)
	}
	conf := fmt.Sprintf(`{
  "cniVersion": "1.0.0",
  "name": %q,
  "plugins": [
    {"type": "bridge", "bridge": "pods0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
     "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`, c.cniName(), filepath.Join(c.cniDir(), "ipam"), PodSubnet)
	if err := os.WriteFile(filepath.Join(c.cniDir(), "10-lab.conflist"), []byte(conf), 0o644); err != nil {
		return fmt.Errorf("lab: CNI configuration: %w", err)
	}
	if err := c.writeNetworks(); err != nil {
		return err
	}
	c.net, err = newHostNet()
	return err
}

// criConfig is the CRI's part of config.toml.
func (c *Containerd) criConfig() string {
	if releases[c.opts.Version].configVersion == 2 {
		const cri = `plugins."io.containerd.grpc.v1.cri"`
		var b strings.Builder
		fmt.Fprintf(&b, "[%s]\nsandbox_image = %q\nrestrict_oom_score_adj = true\ndisable_apparmor = true\nnetns_mounts_under_state_dir = true\n", cri, PauseImage)
		fmt.Fprintf(&b, "enable_unprivileged_ports = true\nenable_unprivileged_icmp = true\n")
		fmt.Fprintf(&b, "[%s.cni]\nbin_dir = %q\nconf_dir = %q\n", cri, cniPlugins, c.cniDir())
		fmt.Fprintf(&b, "[%s.containerd]\nsnapshotter = %q\ndefault_runtime_name = %q\n", cri, c.opts.Snapshotter, HandlerPause)
		fmt.Fprintf(&b, "[%s.containerd.runtimes.%s]\nruntime_type = \"io.containerd.runc.v2\"\n", cri, HandlerRunc)
		fmt.Fprintf(&b, "[%s.containerd.runtimes.%s]\nruntime_type = \"io.containerd.kata.v2\"\nprivileged_without_host_devices = true\npod_annotations = [\"io.katacontainers.*\"]\n", cri, HandlerPause)
		return b.String()
	}
	const images, cri = `plugins."io.containerd.cri.v1.images"`, `plugins."io.containerd.cri.v1.runtime"`
	var b strings.Builder
	fmt.Fprintf(&b, "[%s]\nsnapshotter = %q\n[%s.pinned_images]\nsandbox = %q\n", images, c.opts.Snapshotter, images, PauseImage)
	fmt.Fprintf(&b, "[%s]\nrestrict_oom_score_adj = true\ndisable_apparmor = true\nnetns_mounts_under_state_dir = true\n", cri)
	fmt.Fprintf(&b, "[%s.cni]\nbin_dirs = [%q, %q]\nconf_dir = %q\n", cri, cniPlugins, c.cniPrograms(), c.cniDir())
	fmt.Fprintf(&b, "[%s.containerd]\ndefault_runtime_name = %q\n", cri, HandlerSandbox)
	fmt.Fprintf(&b, "[%s.containerd.runtimes.%s]\nruntime_type = \"io.containerd.runc.v2\"\n", cri, HandlerRunc)
	for handler, sandboxer := range map[string]string{HandlerSandbox: "shim", HandlerPause: "podsandbox"} {
		table := func(name string) {
			fmt.Fprintf(&b, "[%s.containerd.runtimes.%s]\nruntime_type = \"io.containerd.kata.v2\"\nsandboxer = %q\ndisable_pause_image_pull = %t\n", cri, name, sandboxer, sandboxer == "shim")
			fmt.Fprintf(&b, "pod_annotations = [\"io.katacontainers.*\"]\n")
		}
		table(handler)
		fmt.Fprintf(&b, "privileged_without_host_devices = true\n")
		for name := range c.opts.Networks {
			table(handler + "-" + name)
			fmt.Fprintf(&b, "cni_conf_dir = %q\n", c.networkDir(name))
		}
	}
	return b.String()
}

// criImageTime bounds the wait for the CRI to notice an image.
const criImageTime = 20 * time.Second

// ImportCRI imports the busybox and the pause image for the CRI and returns when
// it knows them, which it learns by an event a moment after the import.
func (c *Containerd) ImportCRI(ctx context.Context) error {
	if err := c.ImportBusybox(ctx); err != nil {
		return err
	}
	tar, err := cachedImage("pause", pauseImage)
	if err != nil {
		return err
	}
	if err := c.Import(ctx, tar); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, criImageTime)
	defer cancel()
	for _, image := range []string{BusyboxImage, PauseImage} {
		if err := c.awaitLabel(ctx, image); err != nil {
			return err
		}
	}
	return nil
}

// awaitLabel waits for the label that the CRI puts on an image it has taken in
// (containerd internal/cri/labels, ImageLabelKey). Nothing tells of it but the image itself.
func (c *Containerd) awaitLabel(ctx context.Context, image string) error {
	for {
		out, err := c.must(ctx, criNamespace, "images", "ls", "name=="+image)
		if err != nil {
			return err
		}
		if strings.Contains(out, "io.cri-containerd.image=managed") {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("lab: the CRI does not take in %s: %w", image, ctx.Err())
		}
	}
}

// ImportImage imports an image and returns when the CRI knows it.
func (c *Containerd) ImportImage(ctx context.Context, img Image) error {
	f, err := os.Create(filepath.Join(c.Root, "image.tar"))
	if err != nil {
		return fmt.Errorf("lab: image %s: %w", img.Name, err)
	}
	defer os.Remove(f.Name())
	if err := errors.Join(img.Write(f), f.Close()); err != nil {
		return fmt.Errorf("lab: image %s: %w", img.Name, err)
	}
	if err := c.Import(ctx, f.Name()); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, criImageTime)
	defer cancel()
	return c.awaitLabel(ctx, img.Name)
}

func pauseImage(busybox []byte) (Image, error) {
	const loop = `trap 'exit 0' TERM INT; while :; do sleep 1000000 & wait $!; done`
	return Image{
		Name: PauseImage, Cmd: []string{"/bin/sh", "-c", loop}, Env: []string{"PATH=/bin"},
		Layers: [][]File{{{Path: "bin/busybox", Mode: 0o755, Data: busybox}, {Path: "bin/sh", Link: "busybox"}, {Path: "bin/sleep", Link: "busybox"}}},
	}, nil
}

// closeCRI ends the lab's network and removes what CNI left of its own directories.
func (c *Containerd) closeCRI() error {
	if c.net == nil {
		return nil
	}
	c.net.thread.Close()
	left, _ := filepath.Glob(c.cniResults())
	errs := make([]error, 0, len(left))
	for _, f := range left {
		errs = append(errs, fmt.Errorf("CNI result %s was left", f), os.Remove(f))
	}
	for _, dir := range []string{filepath.Join(cniCache, "results"), cniCache} {
		_ = unix.Rmdir(dir) // in use or missing: stays as it is
	}
	return errors.Join(errs...)
}
