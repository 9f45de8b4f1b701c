// SPDX-License-Identifier: Apache-2.0

//go:build !amd64

package kvmprobe

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// program stands for the micro-guest, which only amd64 has.
type program struct{}

var kernelLike program

// probe creates a virtual machine and nothing more on this architecture.
func probe(ctx context.Context, path string, _ program, _ time.Duration) (Verdict, error) {
	start := time.Now()
	if err := ctx.Err(); err != nil {
		return Verdict{}, err
	}
	v := Verdict{Usable: true, Reason: "KVM created a virtual machine; no micro-guest exists for this architecture"}
	if err := createVM(path); err != nil {
		v.Usable, v.Reason = false, err.Error()
	}
	v.Took = time.Since(start)
	return v, nil
}

func createVM(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	const kvmCreateVM = 0xae01
	fd, err := unix.IoctlRetInt(int(f.Fd()), kvmCreateVM)
	if err != nil {
		return fmt.Errorf("%s: KVM_CREATE_VM: %w", path, err)
	}
	return unix.Close(fd)
}
