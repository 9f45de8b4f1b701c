// SPDX-License-Identifier: Apache-2.0

// Command guestinit is the init of the machine that the vsock tests boot: it
// loads the kernel modules that it finds in /modules in the order of their
// names, serves guestsvc over AF_VSOCK, dials the ready port of the kernel
// command line if there is one, and ends only when ExitPort tells it to. With
// StuckParam it does nothing at all.
package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/guestsvc"
	"github.com/kata-v2/kata/internal/guestsched"
)

const hostCID = 2

func main() {
	if err := run(); err != nil {
		fmt.Println("guestinit:", err)
		os.Exit(1) // the kernel panics and says so on the console
	}
	select {}
}

func run() error {
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	if slices.Contains(strings.Fields(string(line)), guestsvc.StuckParam) {
		return nil
	}
	// As the product's guests do, so that the figures are those of a product's guest.
	if err := guestsched.Tune(); err != nil {
		return err
	}
	modules, err := filepath.Glob("/modules/*.ko") // sorted
	if err != nil {
		return err
	}
	if slices.Contains(strings.Fields(string(line)), guestsvc.SerialParam) {
		return runSerial(modules)
	}
	listening := false
	for _, m := range modules {
		// Listen once the socket family is there, before the device is: what the
		// host has dialled early must find its listener.
		if strings.Contains(m, "transport") && !listening {
			if err := serve(); err != nil {
				return err
			}
			listening = true
		}
		if err := load(m); err != nil {
			return fmt.Errorf("load %s: %w", m, err)
		}
	}
	if !listening { // the kernel has the driver built in: it was up before this process
		if err := serve(); err != nil {
			return err
		}
	}
	if slices.Contains(strings.Fields(string(line)), guestsvc.MoveParam) {
		if err := moveInterrupts(); err != nil {
			return err
		}
	}
	fmt.Println("guestinit: ready")
	return guestsvc.Ready(network, string(line))
}

// moveInterrupts binds all that can be moved to the one CPU and to the other, for ever.
func moveInterrupts() error {
	masks, err := filepath.Glob("/proc/irq/*/smp_affinity")
	if err != nil || len(masks) == 0 {
		return fmt.Errorf("no interrupts below /proc/irq: %w", err)
	}
	// The kernel moves an interrupt when it comes the next time.
	masks = slices.DeleteFunc(masks, func(path string) bool { return os.WriteFile(path, []byte("1"), 0) != nil })
	fmt.Println("guestinit: moves", len(masks), "interrupts")
	go func() {
		for cpus := "2"; ; {
			for _, path := range masks {
				if err := os.WriteFile(path, []byte(cpus), 0); err != nil {
					fmt.Println("guestinit:", err)
					return
				}
			}
			time.Sleep(100 * time.Microsecond) // a streak on one CPU
			cpus = map[string]string{"1": "2", "2": "1"}[cpus]
		}
	}()
	return nil
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

var network = guestsvc.Net{
	Listen: func(port uint32) (net.Listener, error) {
		return vsock.ListenContextID(unix.VMADDR_CID_ANY, port, nil)
	},
	Dial: func(port uint32) (net.Conn, error) { return vsock.Dial(hostCID, port, nil) },
	Exit: func() {
		fmt.Println("guestinit: told to end")
		os.Exit(1) // the kernel panics: init is gone
	},
}

func serve() error {
	_, err := guestsvc.Start(network)
	return err
}
