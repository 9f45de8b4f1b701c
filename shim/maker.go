// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/internal/spawn"
	"github.com/kata-v2/kata/internal/tail"
	"github.com/kata-v2/kata/sandbox"
	"github.com/kata-v2/kata/sandbox/template"
)

// envMaker marks the process that makes a template for a pod's daemon. It reads
// makerParams from stdin, and does nothing until they are there.
const envMaker = "KATA_SHIM_TEMPLATE"

// makerNice is how far the maker, and its VMM, stand back for pods (nice(1)).
const makerNice = 5

// makerEnd is how long the maker may take to remove what it has begun.
const makerEnd = 5 * time.Second

// makerParams are what the maker is to make, and where it logs.
type makerParams struct {
	Daemon   daemonParams
	Config   *config.Config
	HostCPUs int
	Alone    bool
}

// templateMaker returns sandbox.Options.MakeTemplate: this program again, which ends with this process.
func templateMaker(d daemonParams) func(ctx context.Context, c *config.Config, alone bool, place func(pid int) error) error {
	cpus := runtime.NumCPU() // before a pod's cgroup allows fewer
	return func(ctx context.Context, c *config.Config, alone bool, place func(pid int) error) error {
		params, err := json.Marshal(makerParams{d, c, cpus, alone})
		if err != nil {
			return fmt.Errorf("parameters: %w", err)
		}
		cmd := exec.CommandContext(ctx, "/proc/self/exe") // also when its file has been replaced
		cmd.Env = append(os.Environ(), envMaker+"=1")
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
		cmd.WaitDelay = makerEnd
		return runPlaced(cmd, params, place)
	}
}

// runPlaced runs a program that waits for its parameters until it has been placed.
func runPlaced(cmd *exec.Cmd, params []byte, place func(pid int) error) error {
	said := tail.New(2048)
	cmd.Stderr = said
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	t := spawn.NewThread()
	defer t.Close()
	// What this thread forks is as nice as itself.
	err = t.Do(func() error { return syscall.Setpriority(syscall.PRIO_PROCESS, 0, makerNice) })
	if err == nil {
		err = t.Start(cmd)
	}
	if err != nil {
		return errors.Join(err, stdin.Close())
	}
	if err = place(cmd.Process.Pid); err == nil {
		_, err = stdin.Write(params)
	}
	// Without all of its parameters it ends at once.
	if err = errors.Join(err, stdin.Close(), cmd.Wait()); err != nil {
		return fmt.Errorf("%w: %s", err, said)
	}
	return nil
}

// runMaker is the process that templateMaker starts. That somebody else makes the
// template, or that the host has no room for one, is no error.
func runMaker(ctx context.Context, stdin io.Reader) error {
	os.Unsetenv(envMaker)
	var p makerParams
	if err := json.NewDecoder(io.LimitReader(stdin, maxStdin)).Decode(&p); err != nil {
		return fmt.Errorf("parameters: %w", err)
	}
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM)
	defer stop()
	log := newLogger(p.Daemon)
	log.Info("making a template", "alone", p.Alone)
	_, err := sandbox.MakeTemplate(ctx, p.Config, p.HostCPUs, p.Alone, log)
	switch {
	case errors.Is(err, template.ErrBusy):
		return nil
	case errdefs.IsResourceExhausted(err):
		log.Info("no template is made, pods boot", "reason", err)
		return nil
	}
	return err
}
