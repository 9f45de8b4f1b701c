// SPDX-License-Identifier: Apache-2.0

// Command run is `make run`: it starts a private containerd, runs one container
// in a virtual machine, shows where the time of its start went, and checks that
// nothing is left on the machine.
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

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/integration/lab"
	"github.com/kata-v2/kata/integration/lab/leak"
)

// limit bounds the whole run; a cold start without KVM takes seconds.
const limit = 3 * time.Minute

type options struct {
	bin, images, runtime, version, snapshotter string
}

func main() {
	var o options
	flag.StringVar(&o.bin, "bin", "_build/bin", "directory with containerd-shim-kata-v2")
	flag.StringVar(&o.images, "images", "_build/images", "directory with the guest's kernel, root image and manifest")
	flag.StringVar(&o.runtime, "runtime", "io.containerd.kata.v2", "containerd runtime")
	flag.StringVar(&o.version, "containerd", "2.4", "containerd release, "+strings.Join(lab.Versions(), ", "))
	flag.StringVar(&o.snapshotter, "snapshotter", "overlayfs", "containerd snapshotter")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	ctx, stop := context.WithTimeout(ctx, limit)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "run:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	if o.bin, err = filepath.Abs(o.bin); err != nil {
		return err
	}
	if o.images, err = filepath.Abs(o.images); err != nil {
		return err
	}
	before, err := leak.Take()
	if err != nil {
		return err
	}
	ran := container(ctx, o)
	// A failure must leave nothing either.
	left, err := leak.Scope{}.Settle(before, leak.SettleTime)
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("left behind on this machine:\n%s", leak.Format(left))
	}
	if err == nil {
		fmt.Println("left behind        nothing")
	}
	return errors.Join(ran, err)
}

// container runs the container in a lab of its own, which is gone on return.
func container(ctx context.Context, o options) (err error) {
	fmt.Printf("containerd         %s, private\n", o.version)
	c, err := lab.Start(ctx, lab.Options{Version: o.version, ShimDir: o.bin, Snapshotter: o.snapshotter, Kata: &lab.Kata{Images: o.images}})
	if err != nil {
		return err
	}
	defer func() {
		// The sweep has its own bounds and must happen after an interrupt too.
		err = errors.Join(err, c.Stop(context.WithoutCancel(ctx)))
	}()
	if err := c.ImportBusybox(ctx); err != nil {
		return err
	}
	fmt.Printf("container          ctr run --rm --runtime %s %s run uname -r\n", o.runtime, lab.BusyboxImage)
	began := time.Now()
	r, err := c.Run(ctx, o.runtime, "run", nil, "uname", "-r")
	took := time.Since(began)
	if err != nil || r.Code != 0 {
		return errors.Join(err, fmt.Errorf("the container ended with status %d: %s\nlast lines of the log:\n%s", r.Code, strings.TrimSpace(r.Stderr), tail(c.Log(), 30)))
	}
	host, err := hostKernel()
	if err != nil {
		return err
	}
	guest := strings.TrimSpace(r.Stdout)
	if guest == "" {
		return fmt.Errorf("the container ended with status 0 but its output did not arrive; last lines of the log:\n%s", tail(c.Log(), 30))
	}
	fmt.Printf("host kernel        %s\nguest kernel       %s\n", host, guest)
	if strings.HasPrefix(o.runtime, "io.containerd.kata.") {
		if guest == host {
			return errors.New("the container saw the host's kernel: it did not run in a virtual machine")
		}
		if err := printPhases(ctx, c); err != nil {
			return err
		}
	}
	fmt.Printf("whole command      %8.1f ms\n", milliseconds(took))
	return nil
}

// printPhases shows the start's parts from the shim's log line, which reaches
// containerd's log on a path of its own and so possibly after the command's end.
func printPhases(ctx context.Context, c *lab.Containerd) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	line, err := c.WaitLog(ctx, lab.Started)
	if err != nil {
		return fmt.Errorf("the shim's line about the start: %w", err)
	}
	phases, err := lab.Phases(line)
	if err != nil {
		return err
	}
	fmt.Println("start, by phase")
	for _, p := range phases {
		fmt.Printf("  %-16s %8.1f ms\n", strings.TrimPrefix(p.Name, "t_"), milliseconds(p.Time))
	}
	return nil
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func hostKernel() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", fmt.Errorf("uname: %w", err)
	}
	return unix.ByteSliceToString(u.Release[:]), nil
}

func tail(lines []string, n int) string { return strings.Join(lines[max(0, len(lines)-n):], "\n") }
