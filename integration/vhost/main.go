// SPDX-License-Identifier: Apache-2.0

// Command vhost is `make test-vhost`: it runs the tests of integration/vhost/inner
// on a machine whose kernel has what this one may lack – vhost-vsock, vhost-net,
// cgroup v2, device-mapper.
//
// That machine is QEMU without KVM and a Debian cloud kernel, the same that our
// guests boot. Its disk is made of this machine's own programs: QEMU with its
// libraries, virtiofsd, busybox, the lab's containerd, and what `make image` has
// built. Pods that are started in there are emulated by an emulator that is
// emulated itself, which is why this is no part of `make test`.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

type options struct {
	bin, images, modules, dir string
	run                       string
	failFast                  bool
	memory                    int // MiB
	cpus                      int
	limit                     time.Duration
}

func main() {
	var o options
	flag.StringVar(&o.bin, "bin", "_build/bin", "directory with containerd-shim-kata-v2")
	flag.StringVar(&o.images, "images", "_build/images", "directory with the guest's kernel, root image and manifest")
	flag.StringVar(&o.modules, "modules", os.Getenv("KATA_TEST_MODULES"), "lib/modules/<release> of that kernel's package")
	flag.StringVar(&o.dir, "dir", "_build/vhost", "directory for the machine's disk, its initrd and its console log")
	flag.StringVar(&o.run, "run", "", "only the tests that match, as in go test -run")
	flag.BoolVar(&o.failFast, "failfast", false, "end with the first failed test")
	flag.IntVar(&o.memory, "memory", 3072, "memory of the machine in MiB")
	flag.IntVar(&o.cpus, "cpus", 2, "processors of the machine")
	flag.DurationVar(&o.limit, "limit", 45*time.Minute, "the most that the run may take")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	ctx, stop := context.WithTimeout(ctx, o.limit)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "vhost:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	if o.modules == "" {
		return errors.New("KATA_TEST_MODULES is not set and -modules is not given: run by make")
	}
	// A walk does not follow its root.
	if o.modules, err = filepath.EvalSymlinks(o.modules); err != nil {
		return fmt.Errorf("kernel modules: %w", err)
	}
	if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return err
	}
	c := newClock(os.Stdout)
	c.say("building the machine's disk and initrd in %s", o.dir)
	disk, initrd := filepath.Join(o.dir, "root.ext4"), filepath.Join(o.dir, "initrd.img")
	if err := makeDisk(ctx, o, disk); err != nil {
		return fmt.Errorf("disk: %w", err)
	}
	if err := makeInitrd(ctx, o, initrd); err != nil {
		return fmt.Errorf("initrd: %w", err)
	}
	c.say("booting it: %d processors, %d MiB, no KVM", o.cpus, o.memory)
	return boot(ctx, o, c, disk, initrd)
}
