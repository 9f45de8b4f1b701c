// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// ctrTimeout bounds a ctr call whose caller gave no deadline.
const ctrTimeout = 2 * time.Minute

// Result is what a finished ctr call gave.
type Result struct {
	Stdout, Stderr string
	// Code is ctr's exit status: for `ctr run` and `ctr task exec` that of the process.
	Code int
}

// CtrCmd is a ctr command for this daemon and namespace that the caller runs;
// it is killed when ctx is done.
func (c *Containerd) CtrCmd(ctx context.Context, args ...string) *exec.Cmd {
	return c.ctrIn(ctx, c.opts.Namespace, args...)
}

func (c *Containerd) ctrIn(ctx context.Context, namespace string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(c.dir, "ctr"), append([]string{"--address", c.Address, "--namespace", namespace}, args...)...)
	cmd.Env = append(os.Environ(), "PATH="+c.path, rootEnv+"="+c.Root)
	// After the kill, pipes that some descendant holds open are not waited for.
	cmd.WaitDelay = 2 * time.Second
	return cmd
}

// Ctr runs ctr to its end. A non-zero exit status is in Result.Code, not an
// error; the error says that ctr could not be run or was not done in time
// (ctx's deadline, else two minutes).
func (c *Containerd) Ctr(ctx context.Context, args ...string) (Result, error) {
	return c.run(ctx, c.opts.Namespace, args...)
}

func (c *Containerd) run(ctx context.Context, namespace string, args ...string) (Result, error) {
	if _, has := ctx.Deadline(); !has {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, ctrTimeout)
		defer cancel()
	}
	var stdout, stderr bytes.Buffer
	cmd := c.ctrIn(ctx, namespace, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	r := Result{Stdout: stdout.String(), Stderr: stderr.String(), Code: -1}
	if cmd.ProcessState != nil {
		r.Code = cmd.ProcessState.ExitCode()
	}
	if ctx.Err() != nil {
		return r, fmt.Errorf("lab: ctr %s: %w; stderr: %s", strings.Join(args, " "), ctx.Err(), r.Stderr)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return r, fmt.Errorf("lab: ctr %s: %w", strings.Join(args, " "), err)
	}
	return r, nil
}

// must is Ctr for calls whose failure is an error.
func (c *Containerd) must(ctx context.Context, namespace string, args ...string) (string, error) {
	r, err := c.run(ctx, namespace, args...)
	if err == nil && r.Code != 0 {
		err = fmt.Errorf("lab: ctr %s: exit status %d: %s", strings.Join(args, " "), r.Code, strings.TrimSpace(r.Stderr))
	}
	if err != nil {
		return "", err
	}
	return r.Stdout, nil
}

// RunArgs are the ctr arguments of a `ctr run` of the busybox image with the
// lab's snapshotter; flags come before the image.
func (c *Containerd) RunArgs(runtime, id string, flags []string, args ...string) []string {
	all := append([]string{"run", "--snapshotter", c.opts.Snapshotter, "--fifo-dir", c.FIFODir(), "--runtime", runtime}, flags...)
	return append(append(all, BusyboxImage, id), args...)
}

// Run runs one container of the busybox image to its end: `ctr run --rm`.
func (c *Containerd) Run(ctx context.Context, runtime, id string, flags []string, args ...string) (Result, error) {
	return c.Ctr(ctx, c.RunArgs(runtime, id, append([]string{"--rm"}, flags...), args...)...)
}

// Import loads an OCI layout tar and unpacks it for the lab's snapshotter.
func (c *Containerd) Import(ctx context.Context, tar string) error {
	args := []string{"images", "import", "--snapshotter", c.opts.Snapshotter}
	if c.opts.Version != "1.6" {
		// The transfer service unpacks only for platforms that are configured; the client needs no configuration.
		args = append(args, "--local")
	}
	_, err := c.must(ctx, c.opts.Namespace, append(args, tar)...)
	return err
}

// ImportBusybox builds (once) and imports BusyboxImage.
func (c *Containerd) ImportBusybox(ctx context.Context) error {
	tar, err := BusyboxTar()
	if err != nil {
		return err
	}
	return c.Import(ctx, tar)
}

// removeTasks ends every task of every namespace in the way an operator would.
func (c *Containerd) removeTasks(ctx context.Context) error {
	out, err := c.must(ctx, c.opts.Namespace, "namespaces", "ls", "-q")
	if err != nil {
		return err
	}
	var errs []error
	for _, ns := range strings.Fields(out) {
		tasks, err := c.must(ctx, ns, "tasks", "ls", "-q")
		errs = append(errs, err)
		for _, id := range strings.Fields(tasks) {
			_, err := c.must(ctx, ns, "tasks", "rm", "--force", id)
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
