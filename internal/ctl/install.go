// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/kata-v2/kata/deploy"
	"github.com/kata-v2/kata/internal/config"
)

// serviceAccount is where Kubernetes puts a pod's token and certificate.
const serviceAccount = "/var/run/secrets/kubernetes.io/serviceaccount"

// installer are the flags of install and uninstall.
type installer struct {
	*options
	from, root, node            string
	noContainerd, restart, stay bool
	template                    bool
}

func newInstall(o *options) *cobra.Command {
	i := &installer{options: o}
	c := command("install", "Install the programs, the guest images and containerd's handler on a host", o, i.with(i.install))
	c.Flags().StringVar(&i.from, "from", "", "a build: the directory with bin/ and images/ (default: beside this program)")
	c.Flags().BoolVar(&i.template, "template", false, "make the machines from which pods are cloned too, as kata-ctl template init does on the host")
	i.flags(c)
	return c
}

func newUninstall(o *options) *cobra.Command {
	i := &installer{options: o}
	c := command("uninstall", "Undo install; refused while a pod runs", o, i.with(i.uninstall))
	i.flags(c)
	return c
}

func (i *installer) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&i.root, "root", "/", "the host's root directory")
	f.BoolVar(&i.noContainerd, "no-containerd", false, "leave containerd's configuration alone")
	f.BoolVar(&i.restart, "restart-containerd", false, "restart containerd through systemd when its configuration has changed")
	f.StringVar(&i.node, "label-node", "", "set the label "+deploy.NodeLabel+" on this Kubernetes node, or remove it")
	f.BoolVar(&i.stay, "stay", false, "when all is done wait for a signal, as a DaemonSet's container must")
}

// with adds what both commands end with.
func (i *installer) with(f func(context.Context, io.Writer) error) func(*options, context.Context, io.Writer) error {
	return func(_ *options, ctx context.Context, w io.Writer) error {
		if err := f(ctx, w); err != nil || !i.stay {
			return err
		}
		<-ctx.Done()
		return nil
	}
}

func (i *installer) install(ctx context.Context, w io.Writer) error {
	if i.from == "" {
		self, err := os.Executable()
		if err != nil {
			return fmt.Errorf("--from is not given: %w", err)
		}
		i.from = filepath.Dir(filepath.Dir(self))
	}
	changed, err := deploy.Install(i.from, i.root)
	for _, path := range changed {
		fmt.Fprintln(w, "installed", path)
	}
	if err != nil {
		return err
	}
	if err := i.containerd(ctx, w, deploy.AddHandler); err != nil {
		return err
	}
	if i.template {
		// Pods start without: then the first makes one.
		if err := deploy.MakeTemplates(ctx, i.root); err != nil {
			fmt.Fprintln(w, err)
		} else {
			fmt.Fprintln(w, "templates are there")
		}
	}
	return i.label(ctx, w, true)
}

func (i *installer) uninstall(ctx context.Context, w io.Writer) error {
	i.useHostConfig()
	root, err := i.stateRoot()
	if err != nil {
		return err
	}
	pods, err := Pods(filepath.Join(i.root, root), time.Now())
	if err != nil {
		return err
	}
	for _, p := range pods {
		if p.State == Running {
			return fmt.Errorf("pod %s still runs: remove the pods that use the runtime first", p.ID)
		}
	}
	// The label goes first: no pod is to be sent here any more.
	if err := i.label(ctx, w, false); err != nil {
		return err
	}
	if err := i.containerd(ctx, w, deploy.RemoveHandler); err != nil {
		return err
	}
	return deploy.Uninstall(i.root)
}

// useHostConfig takes the configuration below the host's root, unless a flag
// names another: it says where the host's pods are.
func (i *installer) useHostConfig() {
	if i.config != "" || i.root == "/" {
		return
	}
	for _, path := range config.SearchPaths() {
		if path = filepath.Join(i.root, path); fileExists(path) {
			i.config = path
			return
		}
	}
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func (i *installer) containerd(ctx context.Context, w io.Writer, change func(string) (bool, error)) error {
	if i.noContainerd {
		return nil
	}
	changed, err := change(i.root)
	if err != nil || !changed {
		return err
	}
	fmt.Fprintln(w, "containerd's configuration has changed")
	if !i.restart {
		return nil
	}
	fmt.Fprintln(w, "containerd is restarted")
	return deploy.RestartContainerd(ctx, i.root)
}

func (i *installer) label(ctx context.Context, w io.Writer, set bool) error {
	if i.node == "" {
		return nil
	}
	c, err := deploy.InCluster(serviceAccount)
	if err == nil {
		err = c.Label(ctx, i.node, set)
	}
	if err != nil {
		return fmt.Errorf("--label-node: %w", err)
	}
	fmt.Fprintf(w, "node %s: label %s %s\n", i.node, deploy.NodeLabel, map[bool]string{true: "set", false: "removed"}[set])
	return nil
}
