// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/kata-v2/kata/integration/lab"
)

// plugin is what containerd calls the runtimes of the rows.
var plugin = map[string]string{Kata: "io.containerd.kata.v2", Runc: "io.containerd.runc.v2"}

// callTimeout bounds one ctr command.
const callTimeout = 60 * time.Second

// Options of a run.
type Options struct {
	// Bin holds the shim; Images the guest's kernel, root image and manifest.
	// Both are absolute.
	Bin, Images string
	// Modules are lib/modules/<version> of the guest's kernel.
	Modules string
	// Version is the containerd release, one of lab.Versions.
	Version string
	// Snapshotter is containerd's.
	Snapshotter string
	// N is the number of samples of each row.
	N int
	// Only names the rows to measure; empty for all. BaseRow is always one of them.
	Only []string
	// Progress gets a line for each step.
	Progress io.Writer
}

// Env is what the probes measure in: one private containerd.
type Env struct {
	o        Options
	c        *lab.Containerd
	dir      string // of the bench's own files
	serial   int    // numbers the containers
	cri      *criConnection
	qemuPath string
	bareArgs []string
	phases   []string // of a start, in order
	facts    []fact
	onDisks  *Env // of pods with EROFS roots; nil until one is measured
	cloned   *Env // of pods that start from a template; nil until one is measured
}

// fact is a line above the table: what the figures depend on.
type fact struct{ name, value string }

// Run takes all samples. It returns after everything that it started is gone;
// when ctx is done that is some seconds later, with an error.
func Run(ctx context.Context, o Options) (_ *Report, err error) {
	dir, err := os.MkdirTemp("", "kata-lab-bench-")
	if err != nil {
		return nil, fmt.Errorf("bench: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	c, err := lab.Start(ctx, lab.Options{Version: o.Version, ShimDir: o.Bin, Snapshotter: o.Snapshotter, CRI: true, Kata: &lab.Kata{Images: o.Images}})
	if err != nil {
		return nil, err
	}
	// The clean-up must happen after an interrupt too; it has its own bounds.
	defer func() { err = errors.Join(err, c.Stop(context.WithoutCancel(ctx))) }()
	e := &Env{o: o, c: c, dir: dir}
	if e.cri, err = e.connectCRI(ctx); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, e.cri.Close(context.WithoutCancel(ctx))) }()
	defer func() { err = errors.Join(err, e.stopClones(context.WithoutCancel(ctx))) }()
	defer func() { err = errors.Join(err, e.stopBlocks(context.WithoutCancel(ctx))) }()
	fmt.Fprintln(o.Progress, "first pod")
	if err := e.learn(ctx); err != nil {
		return nil, e.explain(err)
	}
	probes, err := selectProbes(e.Probes(), o.Only)
	if err != nil {
		return nil, err
	}
	r := runner{n: o.N, progress: o.Progress}
	if err := r.run(ctx, probes); err != nil {
		return nil, e.explain(err)
	}
	fixed, err := sizes(o)
	if err != nil {
		return nil, err
	}
	return &Report{Results: append(r.results(probes), fixed...), facts: e.facts}, nil
}

// explain adds the end of the daemon's log, which holds the shim's lines.
func (e *Env) explain(err error) error {
	if errors.Is(err, context.Canceled) {
		return err
	}
	lines := e.c.Log()
	return fmt.Errorf("%w\nlast lines of the log:\n%s", err, strings.Join(lines[max(0, len(lines)-20):], "\n"))
}

// Probes are all measurements, in the order of a round.
func (e *Env) Probes() []Probe {
	return []Probe{
		e.bareBoot(),
		e.coldStart(Kata), e.coldStart(Runc),
		e.pod(Kata), e.pod(Runc),
		e.rawVsock(), e.streams(),
		e.pods(Kata), e.pods(Runc),
		e.crowd(4), e.crowd(16),
		e.cloneStart(), e.cloneMemory(),
		e.firstBytes(), e.rootReads(), e.attach(),
		e.idle(),
	}
}

// id names one more container.
func (e *Env) id() string {
	e.serial++
	return fmt.Sprintf("bench-%d", e.serial)
}

// ctr runs ctr to its end and returns the wall time from the start of the
// process to its exit. A status other than 0 is an error.
//
// An interrupt keeps a command from being started but does not end one: a ctr
// that dies in the middle leaves its pipes and half a container behind. For the
// same reason it is in a process group of its own, which ^C does not reach.
func (e *Env) ctr(ctx context.Context, args ...string) (time.Duration, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
	defer cancel()
	cmd := e.c.CtrCmd(ctx, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	began := time.Now()
	err := cmd.Run()
	took := time.Since(began)
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return 0, fmt.Errorf("ctr %s: %w", strings.Join(args, " "), ctx.Err())
	case errors.As(err, &exit):
		return 0, fmt.Errorf("ctr %s: %s: %s", strings.Join(args, " "), exit.ProcessState, strings.TrimSpace(stderr.String()))
	case err != nil:
		return 0, fmt.Errorf("ctr %s: %w", strings.Join(args, " "), err)
	}
	return took, nil
}
