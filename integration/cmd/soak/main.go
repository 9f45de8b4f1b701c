// SPDX-License-Identifier: Apache-2.0

// Command soak lives pods' lives at random and says what went wrong; see package soak.
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
	"time"

	"github.com/kata-v2/kata/integration/lab"
	"github.com/kata-v2/kata/integration/soak"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}

func run() error {
	var bin, images, templates, log string
	var o soak.Options
	flag.StringVar(&bin, "bin", "_build/bin", "directory with containerd-shim-kata-v2")
	flag.StringVar(&images, "images", "_build/images", "directory with the guest's kernel, root image and manifest")
	flag.StringVar(&o.Lab.Version, "containerd", "2.4", "containerd release, "+strings.Join(lab.Versions(), ", "))
	flag.StringVar(&o.Lab.Snapshotter, "snapshotter", "overlayfs", "containerd snapshotter")
	flag.StringVar(&o.Handler, "handler", lab.HandlerSandbox, "runtime handler of the CRI: "+lab.HandlerSandbox+", "+lab.HandlerPause)
	flag.StringVar(&templates, "templates", "false", "whether pods are clones of a template")
	flag.StringVar(&log, "log", "", "file for what containerd and the shims log")
	flag.IntVar(&o.Pods, "pods", 3, "pods at once, each third one by ctr")
	flag.IntVar(&o.Busy, "busy", 0, "endless loops beside")
	flag.BoolVar(&o.Kill, "kill", false, "kill parts of pods")
	flag.DurationVar(&o.For, "for", time.Minute, "how long new pods begin")
	flag.Uint64Var(&o.Seed, "seed", uint64(time.Now().Unix()), "of what is done")
	flag.Parse()
	for _, dir := range []*string{&bin, &images} {
		var err error
		if *dir, err = filepath.Abs(*dir); err != nil {
			return err
		}
	}
	if log != "" {
		f, err := os.Create(log)
		if err != nil {
			return err
		}
		defer f.Close()
		o.Lab.Log = f
	}
	o.Lab.ShimDir = bin
	o.Lab.Kata = &lab.Kata{Images: images, Set: map[string]string{"factory.enable_template": templates}}
	o.Say = func(format string, args ...any) {
		fmt.Printf(time.Now().UTC().Format("15:04:05.000 ")+format+"\n", args...)
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	o.Say("seed %d", o.Seed)
	report, err := soak.Run(ctx, o)
	if report != nil {
		fmt.Print(report)
		if len(report.Faults) > 0 {
			err = errors.Join(err, fmt.Errorf("%d faults", len(report.Faults)))
		}
	}
	return err
}
