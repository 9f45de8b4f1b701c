// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Options choose a private containerd.
type Options struct {
	// Version is the release line, one of Versions; empty means "2.4".
	Version string
	// Root is an existing directory for everything that the daemon writes; Stop
	// empties it of the lab's files. Empty makes a temporary one that Stop removes.
	Root string
	// ShimDir holds containerd-shim-kata-v2; it comes first in the daemon's PATH.
	ShimDir string
	// Kata, when set, makes Start write the shim's configuration into Root.
	Kata *Kata
	// ConfigFile is the shim's configuration (environment KATA_CONF_FILE); it is
	// for a file that the caller has written, instead of Kata.
	ConfigFile string
	// Env is added to the daemon's environment as KEY=value, and so to the shims'.
	Env []string
	// LogLevel is the daemon's, such as "trace"; empty means "debug".
	LogLevel string
	// Log gets every line that the daemon and the shims log, when set.
	Log io.Writer
	// Namespace is where Ctr works; empty means "default".
	Namespace string
	// Snapshotter is what Run and Import use; empty means "overlayfs". "erofs" needs
	// 2.4 (or 2.2) and configures its differ too, "blockfile" gets its scratch file.
	Snapshotter string
	// EROFS is how the erofs snapshotter and its differ are set up.
	EROFS EROFS
	// BlockfileType is the file system of blockfile snapshots: ext4, which empty means, or xfs.
	BlockfileType string
	// CRI keeps the Kubernetes plugins on (of 1.7 and 2.2 only `make test-all` sets
	// up a build that has them) and configures them: the handlers of cri.go, a CNI bridge, all in a network namespace of the
	// lab's own. Ctr works in the CRI's namespace then.
	CRI bool
	// Networks are more networks for pods, with CRI on containerd 2: name → the plugins of a
	// CNI network list, as JSON. Pods of the handlers HandlerSandbox-name and HandlerPause-name
	// are in it; these handlers do without privileged_without_host_devices.
	// @DATA@ in the text is where host-local may keep addresses; plugins that are
	// shell scripts come from Plugins, by name.
	Networks, Plugins map[string]string
	// ExtraConfig is appended to config.toml.
	ExtraConfig string
}

// Containerd is one private daemon.
type Containerd struct {
	// Root is the directory that holds everything of this lab.
	Root string
	// Address is the path of the daemon's socket.
	Address string

	opts      Options
	dir       string // the release's programs
	path      string // PATH of the daemon
	ownsRoot  bool
	log       *logBuffer
	mu        sync.Mutex
	daemon    *daemon  // guarded by mu; nil while none runs
	net       *hostNet // of Options.CRI
	stopped   bool     // guarded by mu
	stopGrace time.Duration
}

// Start starts a daemon and returns once it has announced that it serves. On
// error nothing is left. ctx bounds the start only.
func Start(ctx context.Context, o Options) (*Containerd, error) {
	c, err := prepare(o)
	if err != nil {
		return nil, err
	}
	err = c.makeTemplate(ctx)
	if err == nil {
		err = c.startDaemon(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, c.Stop(context.WithoutCancel(ctx)))
	}
	return c, nil
}

func prepare(o Options) (*Containerd, error) {
	if o.Version == "" {
		o.Version = "2.4"
	}
	r, ok := releases[o.Version]
	if !ok {
		return nil, fmt.Errorf("lab: Version %q: want one of %s", o.Version, strings.Join(Versions(), ", "))
	}
	if o.CRI && r.criDir != "" {
		r.dir = r.criDir
	}
	if o.LogLevel == "" {
		o.LogLevel = "debug"
	}
	if o.Namespace == "" && o.CRI {
		o.Namespace = criNamespace
	}
	if o.Namespace == "" {
		o.Namespace = "default"
	}
	if o.Snapshotter == "" {
		o.Snapshotter = "overlayfs"
	}
	if o.BlockfileType == "" {
		o.BlockfileType = "ext4"
	}
	base, err := Dir()
	if err != nil {
		return nil, err
	}
	c := &Containerd{opts: o, dir: filepath.Join(base, r.dir), log: newLogBuffer(o.Log), stopGrace: 15 * time.Second}
	if _, err := os.Stat(filepath.Join(c.dir, "containerd")); err != nil {
		return nil, fmt.Errorf("lab: containerd %s: run scripts/setup.sh first: %w", o.Version, err)
	}
	c.path = filepath.Join(base, "runc") + ":" + os.Getenv("PATH")
	c.path = c.dir + ":" + c.path
	if o.Snapshotter == "erofs" {
		c.path = filepath.Join(base, "erofs") + ":" + c.path
	}
	if o.ShimDir != "" {
		c.path = o.ShimDir + ":" + c.path
	}
	c.Root = o.Root
	if c.Root == "" {
		if c.Root, err = os.MkdirTemp("", "kata-lab-"); err != nil {
			return nil, fmt.Errorf("lab: root: %w", err)
		}
		c.ownsRoot = true
	}
	// The address appears in Unix socket names; those end at 107 bytes.
	c.Address = filepath.Join(c.Root, "c.sock")
	if o.Kata != nil {
		if c.opts.ConfigFile, err = c.writeKataConfig(*o.Kata); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(c.configFile(), []byte(c.config()), 0o600); err != nil {
		return nil, fmt.Errorf("lab: config.toml: %w", err)
	}
	if o.Snapshotter == "blockfile" {
		if err := c.makeScratch(); err != nil {
			return nil, err
		}
	}
	if o.CRI {
		if err := c.prepareCRI(); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func (c *Containerd) rootDir() string    { return filepath.Join(c.Root, "root") }
func (c *Containerd) stateDir() string   { return filepath.Join(c.Root, "state") }
func (c *Containerd) configFile() string { return filepath.Join(c.Root, "config.toml") }

// Bundle is the directory that a task's shim works in.
func (c *Containerd) Bundle(id string) string {
	return filepath.Join(c.stateDir(), "io.containerd.runtime.v2.task", c.opts.Namespace, id)
}

// FIFODir is where ctr is to make its named pipes (--fifo-dir); its own default is
// a directory of the machine's containerd.
func (c *Containerd) FIFODir() string { return filepath.Join(c.stateDir(), "fifo") }

// StateDir is the daemon's state directory; bundles and mounts are below it.
func (c *Containerd) StateDir() string { return c.stateDir() }

// Namespace is where Ctr works.
func (c *Containerd) Namespace() string { return c.opts.Namespace }

// Snapshotter is what Run and Import use.
func (c *Containerd) Snapshotter() string { return c.opts.Snapshotter }

// PID is the daemon's process id, 0 while none runs.
func (c *Containerd) PID() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.daemon == nil {
		return 0
	}
	return c.daemon.cmd.Process.Pid
}

// Kill ends the daemon with SIGKILL and waits until it is gone. Shims live on.
func (c *Containerd) Kill() error {
	d := c.takeDaemon()
	if d == nil {
		return errors.New("lab: kill: no daemon runs")
	}
	return d.kill()
}

// Terminate ends the daemon in the orderly way and waits until it is gone. Shims live on.
func (c *Containerd) Terminate() error {
	d := c.takeDaemon()
	if d == nil {
		return errors.New("lab: terminate: no daemon runs")
	}
	return d.terminate(c.stopGrace)
}

// Restart ends a running daemon in the orderly way and starts a new one on the
// same directories; after Kill it only starts.
func (c *Containerd) Restart(ctx context.Context) error {
	if d := c.takeDaemon(); d != nil {
		if err := d.terminate(c.stopGrace); err != nil {
			return fmt.Errorf("lab: restart: %w", err)
		}
	}
	return c.startDaemon(ctx)
}

func (c *Containerd) takeDaemon() *daemon {
	c.mu.Lock()
	defer c.mu.Unlock()
	d := c.daemon
	c.daemon = nil
	return d
}

// Stop removes every task, ends the daemon, and sweeps up. It is idempotent.
// What was left after the tasks were removed in the orderly way – processes of
// this lab, mounts below Root – is ended and unmounted all the same, and named
// in the error: such a leftover is a bug of whoever made it. ctx bounds the
// orderly part.
func (c *Containerd) Stop(ctx context.Context) error {
	c.mu.Lock()
	done := c.stopped
	c.stopped = true
	c.mu.Unlock()
	if done {
		return nil
	}
	var errs []error
	if c.PID() != 0 {
		errs = append(errs, c.removeTasks(ctx))
	}
	if d := c.takeDaemon(); d != nil {
		errs = append(errs, d.terminate(c.stopGrace))
	}
	errs = append(errs, c.sweepProcesses(), c.sweepMounts(), c.leftPods(), c.closeCRI(), c.removeFiles())
	removeMachineDirs(c.opts.Namespace)
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("lab: stop: %w", err)
	}
	return nil
}

func (c *Containerd) removeFiles() error {
	if c.ownsRoot {
		return os.RemoveAll(c.Root)
	}
	var errs []error
	for _, p := range []string{c.rootDir(), c.stateDir(), c.PodsDir(), c.cniDir(), c.kataConfigFile(), c.configFile(), c.Address, c.Address + ".ttrpc", c.notifySocket()} {
		errs = append(errs, os.RemoveAll(p))
	}
	return errors.Join(errs...)
}
