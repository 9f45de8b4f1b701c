// SPDX-License-Identifier: Apache-2.0

package hypervisortest

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/guestsvc"
)

// phases are those that hypervisor.StartError documents.
var phases = []string{"config", "vsock", "exec", "qmp", "restore", "boot"}

var errStarted = errors.New("the caller does not want it")

// startErrors checks every failure's form, and that nothing is left of it.
func (s *suite) startErrors() {
	type failure struct {
		name, phase string // phase is any when empty
		change      func(*hypervisor.Config)
		is          error
	}
	failures := []failure{
		{"no id", "config", func(c *hypervisor.Config) { c.ID = "" }, nil},
		{"no CPU", "config", func(c *hypervisor.Config) { c.CPUs = 0 }, nil},
		{"odd memory", "config", func(c *hypervisor.Config) { c.MemoryBytes = 1000 }, nil},
		{"no kernel", "config", func(c *hypervisor.Config) { c.Kernel = "/nonexistent/kernel" }, os.ErrNotExist},
		{"no initrd", "config", func(c *hypervisor.Config) { c.Initrd = "/nonexistent/initrd" }, os.ErrNotExist},
		{"vsock", "vsock", func(c *hypervisor.Config) { c.Vsock = "pigeon" }, nil},
		{"network", "exec", func(c *hypervisor.Config) { c.Network.Path = "/nonexistent/ns" }, os.ErrNotExist},
		{"started", "", func(c *hypervisor.Config) { c.Started = s.refuse(c.Started) }, errStarted},
	}
	if s.NoHotplug {
		failures = append(failures,
			failure{"ports", "config", func(c *hypervisor.Config) { c.HotplugPorts = 1 }, nil},
			failure{"more CPUs", "config", func(c *hypervisor.Config) { c.MaxCPUs = c.CPUs + 1 }, nil})
	}
	for _, c := range failures {
		s.Run(c.name, func(t *testing.T) {
			sub := &suite{T: t, Harness: s.Harness}
			before := snapshot(t)
			vc := sub.config("failing")
			c.change(&vc)
			closed := sub.share(&vc)
			err := sub.startFails(context.Background(), vc)
			var se *hypervisor.StartError
			if !errors.As(err, &se) || !slices.Contains(phases, se.Phase) || (c.phase != "" && se.Phase != c.phase) {
				t.Errorf("%v: want a *StartError of phase %q", err, c.phase)
			}
			if c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("%v: want %v in it", err, c.is)
			}
			closed()
			sub.nothingLeft(before)
		})
	}
}

func (s *suite) refuse(started func(string, int) error) func(string, int) error {
	return func(name string, pid int) error {
		_ = started(name, pid) // notes the pid
		return errStarted
	}
}

// share adds a virtio-fs device; the returned function checks that the backend
// has closed its end.
func (s *suite) share(c *hypervisor.Config) (closed func()) {
	s.Helper()
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	s.must(err)
	ours, theirs := os.NewFile(uintptr(p[0]), "daemon"), os.NewFile(uintptr(p[1]), "share")
	c.Shares = []hypervisor.Share{{Tag: "suite", Conn: theirs}}
	return func() {
		s.Helper()
		defer ours.Close()
		s.must(ours.SetReadDeadline(time.Now().Add(s.Timeout)))
		if _, err := io.Copy(io.Discard, ours); err != nil && !errors.Is(err, unix.ECONNRESET) {
			s.Errorf("the share's connection is not closed: %v", err)
		}
	}
}

// startFails starts what must not start.
func (s *suite) startFails(ctx context.Context, c hypervisor.Config) error {
	s.Helper()
	vm, err := s.Hypervisor.Start(ctx, c)
	if err == nil {
		s.stop(vm)
		s.Fatal("it started")
	}
	if vm != nil {
		s.Errorf("a machine beside the error: %v", vm)
	}
	return err
}

// cancelledStart ends contexts before and while Start runs.
func (s *suite) cancelledStart() {
	for _, name := range []string{"before", "while"} {
		s.Run(name, func(t *testing.T) {
			sub := &suite{T: t, Harness: s.Harness}
			before := snapshot(t)
			vc := sub.config(name)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			if name == "before" {
				cancel()
			} else {
				started := vc.Started
				vc.Started = func(name string, pid int) error { cancel(); return started(name, pid) }
			}
			closed := sub.share(&vc)
			var se *hypervisor.StartError
			if err := sub.startFails(ctx, vc); !errors.Is(err, context.Canceled) || !errors.As(err, &se) {
				t.Errorf("%v: want context.Canceled in a *StartError", err)
			}
			closed()
			sub.nothingLeft(before)
		})
	}
}

// stuck is a machine whose guest does not come up.
func (s *suite) stuck(id string) hypervisor.VM {
	c := s.config(id)
	c.KernelParams = append(c.KernelParams[:len(c.KernelParams):len(c.KernelParams)], guestsvc.StuckParam)
	return s.start(c)
}

func (s *suite) killedDuringBoot() {
	vm := s.stuck("killed")
	s.killed(vm, s.boot(vm))
}

func (s *suite) stoppedDuringBoot() {
	vm := s.stuck("stopped")
	waiting := s.boot(vm)
	s.stop(vm)
	s.allFail(waiting)
	if err := vm.Err(); err != nil {
		s.Errorf("Err after an orderly Stop: %v", err)
	}
	s.afterwards(vm)
}
