// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/integration/lab"
)

// hostDirs can be written by what runs in the cluster, the DaemonSet that installs
// the runtime, and are as they were when it ends: overlays whose upper layer is in
// memory, below overlayDir.
var hostDirs = []string{"/etc", "/usr"}

const overlayDir = "/run/cluster-host"

// Where a restart of containerd is asked for and answered, by systemctl.
const (
	restartAsked    = "/run/cluster-restart-asked"
	restartAnswered = "/run/cluster-restart-answered"
)

// systemctl is the node's: it knows one command.
const systemctl = `#!/bin/sh
[ "$*" = "restart containerd" ] || { echo "systemctl $*: only restart containerd" >&2; exit 1; }
echo >` + restartAsked + `
read -r answer <` + restartAnswered + `
[ "$answer" = done ] || { echo "$answer" >&2; exit 1; }
`

// makeHost prepares hostDirs and the node's systemctl.
func makeHost() error {
	for _, dir := range hostDirs {
		upper, work := overlayDir+dir+"/upper", overlayDir+dir+"/work"
		if err := errors.Join(os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755)); err != nil {
			return fmt.Errorf("cluster: %w", err)
		}
		if err := unix.Mount("cluster", dir, "overlay", 0, "lowerdir="+dir+",upperdir="+upper+",workdir="+work); err != nil {
			return fmt.Errorf("cluster: an overlay on %s: %w", dir, err)
		}
	}
	for _, p := range []string{restartAsked, restartAnswered} {
		if err := unix.Mkfifo(p, 0o600); err != nil {
			return fmt.Errorf("cluster: %s: %w", p, err)
		}
	}
	const path = "/usr/bin/systemctl"
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cluster: %w", err)
	}
	return os.WriteFile(path, []byte(systemctl), 0o755)
}

// Restarts does what the node's systemctl is asked for, until stop is called: a
// restart of containerd with the configuration that is in /etc/containerd then.
// stop returns how often that was, and what went wrong.
func (c *Cluster) Restarts(ctx context.Context) (stop func() (int, error)) {
	// Both ends: nobody waits in an open, and a reader does not see an end.
	asked, err := os.OpenFile(restartAsked, os.O_RDWR, 0)
	if err != nil {
		return func() (int, error) { return 0, err }
	}
	n, finished := 0, make(chan error)
	go func() {
		var errs []error
		line := make([]byte, 1)
		for {
			if _, err := asked.Read(line); err != nil {
				finished <- errors.Join(errs...)
				return
			}
			n++
			answer := "done"
			if err := errors.Join(c.takeHostConfig(), c.Containerd.Restart(ctx)); err != nil {
				errs, answer = append(errs, err), strings.ReplaceAll(err.Error(), "\n", " ")
			}
			errs = append(errs, os.WriteFile(restartAnswered, []byte(answer+"\n"), 0))
		}
	}()
	return func() (int, error) {
		asked.Close()
		return n, <-finished
	}
}

// hostConfig is containerd's configuration where an operator's is.
const hostConfig = "/etc/containerd"

// TakeOff makes the node one on which the shim is not installed: containerd has its
// configuration where an operator's is, without the shim's handlers, with runc by
// default, and runs with it. restore undoes that.
func (c *Cluster) TakeOff(ctx context.Context) (restore func(context.Context) error, err error) {
	config := filepath.Join(c.Containerd.Root, "config.toml")
	text, err := os.ReadFile(config)
	if err != nil {
		return nil, fmt.Errorf("cluster: %w", err)
	}
	if err := errors.Join(os.RemoveAll(hostConfig), os.MkdirAll(hostConfig, 0o755)); err != nil {
		return nil, fmt.Errorf("cluster: %w", err)
	}
	if err := os.WriteFile(filepath.Join(hostConfig, "config.toml"), []byte(withoutShim(string(text))), 0o644); err != nil {
		return nil, fmt.Errorf("cluster: %w", err)
	}
	restore = func(ctx context.Context) error {
		return errors.Join(os.WriteFile(config, text, 0o600), c.Containerd.Restart(ctx))
	}
	if err := errors.Join(c.takeHostConfig(), c.Containerd.Restart(ctx)); err != nil {
		return nil, errors.Join(err, restore(ctx))
	}
	return restore, nil
}

// withoutShim is a configuration of the lab as it is before an installation.
func withoutShim(text string) string {
	var kept strings.Builder
	ours := false
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "[") {
			ours = strings.Contains(line, ".containerd.runtimes."+lab.HandlerSandbox)
		}
		switch {
		case ours:
		case strings.HasPrefix(line, "imports ="): // the lab turns them off: the machine's own have no part in it
		case strings.HasPrefix(line, "default_runtime_name"):
			fmt.Fprintf(&kept, "default_runtime_name = %q\n", lab.HandlerRunc)
		default:
			kept.WriteString(line)
		}
	}
	return kept.String()
}

// takeHostConfig makes that configuration the one of the next start.
func (c *Cluster) takeHostConfig() error {
	text, err := os.ReadFile(filepath.Join(hostConfig, "config.toml"))
	if err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	// Imports are relative to the file, which is in another place.
	text = []byte(strings.Replace(string(text), `imports = ["conf.d/`, `imports = ["`+hostConfig+`/conf.d/`, 1))
	return os.WriteFile(filepath.Join(c.Containerd.Root, "config.toml"), text, 0o600)
}

// UseInstalled makes containerd find the shim that is installed below /usr/local/bin
// in place of the build's, until undo is called.
func (c *Cluster) UseInstalled() (undo func() error, err error) {
	bin := filepath.Join(c.opts.Build, "bin")
	if err := unix.Mount("/usr/local/bin", bin, "", unix.MS_BIND, ""); err != nil {
		return nil, fmt.Errorf("cluster: %s: %w", bin, err)
	}
	return func() error { return unix.Unmount(bin, unix.MNT_DETACH) }, nil
}
