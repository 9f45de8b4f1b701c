// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/kata-v2/kata/images/cpio"
	"github.com/kata-v2/kata/images/modules"
)

// wanted are the modules of a host: the disk, vsock from both ends, the devices
// behind vhost, what containerd and the lab mount and link.
var wanted = []string{
	"virtio_pci", "virtio_blk",
	"vhost_vsock", "vsock_loopback", "vhost_net", "tun", "veth", "sch_ingress", "cls_u32", "cls_matchall", "act_mirred",
	"overlay", "loop", "dm_mod", "erofs",
}

// makeInitrd builds the machine's first root: the modules, and the program that
// loads them, mounts the disk, and runs the tests.
func makeInitrd(ctx context.Context, o options, initrd string) error {
	program := filepath.Join(o.dir, "outerinit")
	if err := command(ctx, "go", "build", "-ldflags=-s -w", "-o", program, "github.com/kata-v2/kata/integration/vhost/outerinit"); err != nil {
		return err
	}
	data, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	wants := make([]modules.Want, 0, len(wanted))
	for _, name := range wanted {
		wants = append(wants, modules.Want{Group: modules.Boot, Name: name})
	}
	picked, err := modules.Pick(o.modules, wants)
	if err != nil {
		return err
	}
	entries := []cpio.Entry{
		cpio.File("init", 0o755, data),
		cpio.CharDevice("dev/console", 0o600, 5, 1),
		cpio.Dir("proc", 0o755), cpio.Dir("sys", 0o755), cpio.Dir("disk", 0o755),
		cpio.File(modules.Dir+"/order", 0o644, modules.Order(picked)),
	}
	for _, m := range picked {
		entries = append(entries, cpio.File(modules.Dir+"/"+m.File, 0o644, m.Data))
	}
	f, err := os.Create(initrd)
	if err != nil {
		return err
	}
	return errors.Join(cpio.Write(f, entries), f.Close())
}
