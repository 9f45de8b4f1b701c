// SPDX-License-Identifier: Apache-2.0

// Command bench is `make bench`: it measures containers in virtual machines
// against the bare machine, runc and other runtimes, prints one table, writes the
// samples to a file and draws them; and it compares two such files
// (`make bench-compare`). See integration/bench.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/kata-v2/kata/hypervisor/hypervisortest/guestimage"
	"github.com/kata-v2/kata/integration/bench"
	"github.com/kata-v2/kata/integration/lab"
	"github.com/kata-v2/kata/integration/lab/leak"
)

// options are the flags beside bench.Options.
type options struct {
	bench.Options
	only, svg, base string
	resume, draw    bool
}

func main() {
	o := options{Options: bench.Options{Progress: os.Stderr}}
	flag.StringVar(&o.Bin, "bin", "_build/bin", "directory with containerd-shim-kata-v2")
	flag.StringVar(&o.Images, "images", "_build/images", "directory with the guest's kernel, root image and manifest")
	flag.StringVar(&o.Modules, "modules", os.Getenv(guestimage.EnvModules), "lib/modules/<version> of the guest's kernel")
	flag.StringVar(&o.Version, "containerd", "2.4", "containerd release, "+strings.Join(lab.Versions(), ", "))
	flag.StringVar(&o.Snapshotter, "snapshotter", "overlayfs", "containerd snapshotter")
	flag.IntVar(&o.N, "n", bench.MinSamples, "samples of each row; below 7 no ratio is given")
	flag.StringVar(&o.only, "only", "", "names of rows to measure, separated by commas; all when empty")
	flag.Func("peer", "another runtime to measure, NAME=RUNTIME such as gvisor=io.containerd.runsc.v1, or NAME=BINARY, the path of a program like runc; may be repeated", func(s string) error {
		p, err := bench.ParsePeer(s)
		o.Peers = append(o.Peers, p)
		return err
	})
	flag.StringVar(&o.Path, "json", "_build/bench.json", "where the samples go, after each of them")
	flag.StringVar(&o.svg, "svg", "", "where the drawing goes, if anywhere")
	flag.BoolVar(&o.resume, "resume", false, "go on with the run whose samples are in -json")
	flag.DurationVar(&o.Budget, "budget", 0, "time that the run may take, such as 40m: rows that do not fit are left out and named; -resume goes on later")
	flag.BoolVar(&o.draw, "draw", false, "measure nothing: print the table of -json and draw -svg")
	flag.StringVar(&o.base, "compare", "", "measure nothing: compare -json with this file; exits 1 when something is worse")
	flag.Parse()
	if o.only != "" {
		o.Only = strings.Split(o.only, ",")
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	if err := o.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func (o *options) run(ctx context.Context) error {
	switch {
	case flag.NArg() > 0:
		return fmt.Errorf("argument %q: want flags only", flag.Arg(0))
	case o.base != "":
		return o.compare()
	case o.draw:
		r, err := bench.ReadFile(o.Path)
		if err != nil {
			return err
		}
		return o.show(r)
	}
	return o.measure(ctx)
}

// compare prints what changed between two files.
func (o *options) compare() error {
	base, err := bench.ReadFile(o.base)
	if err != nil {
		return err
	}
	now, err := bench.ReadFile(o.Path)
	if err != nil {
		return err
	}
	worse, err := bench.WriteComparison(os.Stdout, base, now)
	if err == nil && worse > 0 {
		err = fmt.Errorf("worse than %s: %d rows", o.base, worse)
	}
	return err
}

// show prints the table and draws it.
func (o *options) show(r *bench.Report) error {
	if o.svg != "" {
		if err := os.WriteFile(o.svg, bench.SVG(r.Results), 0o644); err != nil {
			return err
		}
	}
	return r.WriteTable(os.Stdout)
}

func (o *options) measure(ctx context.Context) (err error) {
	if o.N < 1 {
		return fmt.Errorf("-n %d: want at least 1", o.N)
	}
	if o.Bin, err = filepath.Abs(o.Bin); err != nil {
		return err
	}
	if o.Images, err = filepath.Abs(o.Images); err != nil {
		return err
	}
	if o.resume {
		if o.Resume, err = bench.ReadFile(o.Path); err != nil {
			return err
		}
	}
	before, err := leak.Take()
	if err != nil {
		return err
	}
	report, ran := bench.Run(ctx, o.Options)
	// A failure must leave nothing either.
	left, err := leak.Scope{}.Settle(before, leak.SettleTime)
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("left behind on this machine:\n%s", leak.Format(left))
	}
	if ran != nil {
		return errors.Join(ran, err)
	}
	// What is left behind does not make the figures wrong, but the run a failure.
	errs := []error{report.WriteFile(o.Path), o.show(report), err}
	for _, f := range report.Failed {
		errs = append(errs, fmt.Errorf("no figures of %s", strings.Join(f.Rows, ", ")))
	}
	return errors.Join(errs...)
}
