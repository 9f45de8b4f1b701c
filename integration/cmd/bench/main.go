// SPDX-License-Identifier: Apache-2.0

// Command bench is `make bench`: it measures containers in virtual machines
// against the bare machine and against runc, prints one table and writes the
// samples to a file. See integration/bench.
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

func main() {
	o := bench.Options{Progress: os.Stderr}
	var only, path string
	flag.StringVar(&o.Bin, "bin", "_build/bin", "directory with containerd-shim-kata-v2")
	flag.StringVar(&o.Images, "images", "_build/images", "directory with the guest's kernel, root image and manifest")
	flag.StringVar(&o.Modules, "modules", os.Getenv(guestimage.EnvModules), "lib/modules/<version> of the guest's kernel")
	flag.StringVar(&o.Version, "containerd", "2.4", "containerd release, "+strings.Join(lab.Versions(), ", "))
	flag.StringVar(&o.Snapshotter, "snapshotter", "overlayfs", "containerd snapshotter")
	flag.IntVar(&o.N, "n", bench.MinSamples, "samples of each row; below 7 no ratio is given")
	flag.StringVar(&only, "only", "", "names of rows to measure, separated by commas; all when empty")
	flag.StringVar(&path, "json", "_build/bench.json", "where the samples go")
	flag.Parse()
	if only != "" {
		o.Only = strings.Split(only, ",")
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	if err := run(ctx, o, path); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o bench.Options, path string) (err error) {
	if o.N < 1 {
		return fmt.Errorf("-n %d: want at least 1", o.N)
	}
	if o.Bin, err = filepath.Abs(o.Bin); err != nil {
		return err
	}
	if o.Images, err = filepath.Abs(o.Images); err != nil {
		return err
	}
	before, err := leak.Take()
	if err != nil {
		return err
	}
	report, ran := bench.Run(ctx, o)
	// A failure must leave nothing either.
	left, err := leak.Scope{}.Settle(before, leak.SettleTime)
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("left behind on this machine:\n%s", leak.Format(left))
	}
	if ran != nil {
		return errors.Join(ran, err)
	}
	// What is left behind does not make the figures wrong, but the run a failure.
	return errors.Join(bench.WriteJSON(path, report.Results), report.WriteTable(os.Stdout), err)
}
