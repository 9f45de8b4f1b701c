// SPDX-License-Identifier: Apache-2.0

package cluster

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

// kubectlTime bounds a call whose caller gave no deadline.
const kubectlTime = 3 * time.Minute

// Result is what a finished kubectl gave.
type Result struct {
	Stdout, Stderr string
	// Code is kubectl's exit status.
	Code int
}

// KubectlCmd is a kubectl of the administrator that the caller starts with
// StartCmd; it is killed when ctx is done.
func (c *Cluster) KubectlCmd(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(c.opts.Programs, "bin", "kubectl"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.pki.file("admin.conf"), "HOME="+c.path("home"))
	cmd.WaitDelay = 2 * time.Second
	return cmd
}

// StartCmd starts a command in the node's network.
func (c *Cluster) StartCmd(cmd *exec.Cmd) error { return c.Containerd.InHostNet(cmd.Start) }

// Kubectl runs kubectl to its end. A non-zero exit status is in Result.Code, not
// an error; the error says that it could not be run or was not done in time
// (ctx's deadline, else three minutes).
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (Result, error) {
	if _, has := ctx.Deadline(); !has {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, kubectlTime)
		defer cancel()
	}
	cmd := c.KubectlCmd(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := c.StartCmd(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	r := Result{Stdout: stdout.String(), Stderr: stderr.String(), Code: -1}
	if cmd.ProcessState != nil {
		r.Code = cmd.ProcessState.ExitCode()
	}
	if ctx.Err() != nil {
		return r, fmt.Errorf("kubectl %s: %w; stderr: %s", strings.Join(args, " "), ctx.Err(), r.Stderr)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return r, fmt.Errorf("kubectl %s: %w", strings.Join(args, " "), err)
	}
	return r, nil
}

// Must is Kubectl for calls whose failure is an error; it returns standard output.
func (c *Cluster) Must(ctx context.Context, args ...string) (string, error) {
	r, err := c.Kubectl(ctx, args...)
	if err == nil && r.Code != 0 {
		err = fmt.Errorf("kubectl %s: exit status %d: %s", strings.Join(args, " "), r.Code, strings.TrimSpace(r.Stderr))
	}
	return r.Stdout, err
}
