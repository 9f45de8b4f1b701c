// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/hypervisortest/guestimage"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/guestsvc"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/measure"
	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/sandbox"
)

const (
	// streamBytes go through a stream for one sample.
	streamBytes = 128 << 20
	// streamWrite is the size of one write at the sending end, of the raw stream and
	// of the container's program alike.
	streamWrite = 64 << 10
	// roundTrips of one byte make one sample, which is their median.
	roundTrips = 500
	// streamTimeout bounds one sample of a stream.
	streamTimeout = 60 * time.Second
)

// rawVsock measures the product's vsock device with nothing around it: a
// machine of the product's kernel, size and command line whose first process
// reads and writes a stream. It is what stdio is compared with.
func (e *Env) rawVsock() Probe {
	rtt, up, down := Row{"vsock-rtt", Kata, Milliseconds}, Row{vsockUp, Kata, MegabytesPerSecond}, Row{vsockDown, Kata, MegabytesPerSecond}
	return Probe{Rows: []Row{up, down, rtt}, Take: func(ctx context.Context, add Add) error {
		return e.withRawMachine(ctx, func(vm hypervisor.VM) error {
			ctx, cancel := context.WithTimeout(ctx, streamTimeout)
			defer cancel()
			median, err := measure.RoundTrip(ctx, vm, roundTrips)
			if err != nil {
				return err
			}
			add(rtt, milliseconds(median))
			rate, err := measure.Up(ctx, vm, streamBytes, streamWrite)
			if err != nil {
				return err
			}
			add(up, rate)
			if rate, err = measure.Down(ctx, vm, streamBytes, streamWrite); err != nil {
				return err
			}
			add(down, rate)
			return nil
		})
	}}
}

// withRawMachine runs f beside a machine whose guest serves streams.
func (e *Env) withRawMachine(ctx context.Context, f func(hypervisor.VM) error) (err error) {
	cfg, _, err := config.Load(config.LoadOptions{Path: e.c.ConfigFile()})
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	initrd := filepath.Join(e.dir, "streams.cpio")
	if _, err := os.Stat(initrd); errors.Is(err, os.ErrNotExist) {
		if err := guestimage.Write(initrd, e.o.Modules); err != nil {
			return err
		}
	}
	dir, err := os.MkdirTemp(e.dir, "machine-")
	if err != nil {
		return err
	}
	vm, err := sandbox.NewQEMU(cfg, slog.New(slog.DiscardHandler)).Start(ctx, hypervisor.Config{
		ID: "streams", Dir: dir, Kernel: cfg.QEMU.Kernel, Initrd: initrd, CPUs: 1, MemoryBytes: cfg.QEMU.MemoryBytes(),
		Vsock: hypervisor.VsockBackend(cfg.QEMU.Vsock), ReadyParam: guestsvc.ReadyParam,
	})
	if err != nil {
		return err
	}
	// A driver that is built in is up before the guest's program listens.
	if err = vm.(hypervisor.ReadyWaiter).WaitReady(ctx); err == nil {
		err = f(vm)
	}
	if err != nil {
		err = fmt.Errorf("%w; console: %s", err, vm.Info().ConsoleTail())
	}
	// An interrupt ends the measurement, not the machine's orderly end.
	sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
	defer cancel()
	return errors.Join(err, vm.Stop(sctx), os.RemoveAll(dir))
}
