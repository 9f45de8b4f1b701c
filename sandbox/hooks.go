// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/internal/tail"
)

// hookOutput is how much of a failing hook's output its error carries, in bytes.
const hookOutput = 1024

// runHooks runs the hooks of one point of a container's life on the host, where
// those who wrote them (network and device plugins) expect to be: in order, each
// with the container's state on standard input (runtime-spec config.md, POSIX-platform
// Hooks). The first failure ends the list.
func (c *Container) runHooks(ctx context.Context, point string, hooks []specs.Hook, status specs.ContainerState) error {
	if len(hooks) == 0 {
		return nil
	}
	state, err := json.Marshal(specs.State{
		Version: specs.Version, ID: c.id, Status: status, Pid: c.s.PID(), Bundle: c.bundle, Annotations: c.spec.Annotations,
	})
	if err != nil {
		return fmt.Errorf("hooks.%s: %w", point, err)
	}
	for i, h := range hooks {
		if err := runHook(ctx, h, state); err != nil {
			return fmt.Errorf("hooks.%s[%d] (%s): %w", point, i, h.Path, err)
		}
	}
	return nil
}

func runHook(ctx context.Context, h specs.Hook, state []byte) error {
	if h.Timeout != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(*h.Timeout)*time.Second)
		defer cancel()
	}
	out := tail.New(hookOutput)
	cmd := exec.CommandContext(ctx, h.Path)
	if len(h.Args) > 0 {
		cmd.Args = h.Args
	}
	cmd.Env = h.Env
	if cmd.Env == nil {
		cmd.Env = []string{} // none, and not ours
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(state), out, out
	cmd.WaitDelay = time.Second // what it left behind may hold its output open
	err := cmd.Run()
	if ctx.Err() != nil {
		err = errors.Join(err, ctx.Err())
	}
	if err == nil {
		return nil
	}
	if s := strings.TrimSpace(out.String()); s != "" {
		return fmt.Errorf("%w: %s", err, s)
	}
	return err
}

// hooks is never nil.
func (c *Container) hooks() *specs.Hooks {
	if c.spec.Hooks == nil {
		return &specs.Hooks{}
	}
	return c.spec.Hooks
}
