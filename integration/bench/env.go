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
	// Only names the rows to measure; empty for all but what has to be asked for.
	// BaseRow is always one of them.
	Only []string
	// Peers are more runtimes to measure beside runc, which have to be installed.
	Peers []Peer
	// Budget, when set, is the time after which no further sample is begun. Rows that are
	// not expected to get all theirs are left out, and named.
	Budget time.Duration
	// Path, when set, is a file that gets the report as far as it is, after each sample.
	Path string
	// Resume, when set, is the report of a run that this one goes on with.
	Resume *Report
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
	facts    []Fact
	onDisks  *Env // of pods with EROFS roots; nil until one is measured
	onUppers *Env // of pods with EROFS roots and an ext4 for what they write; nil until one is measured
	cloned   *Env // of pods that start from a template; nil until one is measured
}

// Run takes all samples. It returns after everything that it started is gone;
// when ctx is done that is some seconds later, with an error.
func Run(ctx context.Context, o Options) (_ *Report, err error) {
	began := time.Now()
	dir, err := os.MkdirTemp("", "kata-lab-bench-")
	if err != nil {
		return nil, fmt.Errorf("bench: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	c, err := lab.Start(ctx, lab.Options{Version: o.Version, ShimDir: o.Bin, Snapshotter: o.Snapshotter, CRI: true, Kata: &lab.Kata{Images: o.Images}, ExtraConfig: peerHandlers(o)})
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
	defer func() { err = errors.Join(err, e.stopWritable(context.WithoutCancel(ctx))) }()
	fmt.Fprintln(o.Progress, "first pod")
	if err := e.learn(ctx); err != nil {
		return nil, e.explain(err)
	}
	return e.measure(ctx, began)
}

// measure runs the probes that are wanted and makes the report.
func (e *Env) measure(ctx context.Context, began time.Time) (*Report, error) {
	o := e.o
	probes, err := selectProbes(e.Probes(), o.Only)
	if err != nil {
		return nil, err
	}
	fixed, err := sizes(o)
	if err != nil {
		return nil, err
	}
	r := runner{n: o.N, progress: o.Progress}
	if o.Budget > 0 {
		r.until = began.Add(o.Budget)
	}
	if o.Resume != nil {
		if err := o.Resume.resumable(e.facts); err != nil {
			return nil, err
		}
		r.samples = o.Resume.samples()
	}
	report := func() *Report {
		return &Report{Facts: e.facts, Complete: r.complete(probes), Failed: r.failures(probes), Short: r.missesOf(probes), Results: append(r.results(probes), fixed...)}
	}
	if o.Path != "" {
		r.save = func() error { return report().WriteFile(o.Path) }
	}
	if err := r.run(ctx, probes); err != nil {
		return nil, e.explain(err)
	}
	return report(), nil
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
	probes := []Probe{e.bareBoot()}
	for _, r := range e.o.runtimes() {
		probes = append(probes, e.coldStart(r))
	}
	for _, r := range e.o.runtimes() {
		probes = append(probes, e.pod(r))
	}
	probes = append(probes, e.rawVsock())
	for _, r := range e.o.runtimes() {
		// The Task API of version 3 is what the streams are measured through.
		if r == Kata || !strings.HasPrefix(e.o.Version, "1.") {
			probes = append(probes, e.streams(r))
		}
	}
	for _, r := range e.o.runtimes() {
		probes = append(probes, e.pods(r))
	}
	return append(probes, e.podColdStart(),
		e.crowd(4), e.crowd(16),
		e.cloneStart(), e.cloneCrowd(4), e.cloneCrowd(16),
		e.firstBytes(), e.rootReads(), e.fileSystems(), e.attach(), e.syncs(), e.resize(),
		e.cloneMemory(), e.density(), e.coldDensity(), e.cloneCrowd(64),
		e.idle())
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
	return e.ctrWithin(ctx, callTimeout, args...)
}

// ctrWithin is ctr with a bound of its own.
func (e *Env) ctrWithin(ctx context.Context, bound time.Duration, args ...string) (time.Duration, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), bound)
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
