// SPDX-License-Identifier: Apache-2.0

// Command init is the first process of the guest that boot_test.go starts: it
// loads every module in the order of the list, says on the console how that
// went, and restarts the machine, which ends QEMU.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const dir = "/lib/modules/kata"

func main() {
	// Standard output is /dev/console, opened by the kernel.
	order, err := os.ReadFile(filepath.Join(dir, "order"))
	if err != nil {
		fmt.Println("order:", err)
	}
	for line := range strings.Lines(string(order)) {
		f := strings.Fields(line)
		fmt.Printf("module %s %v\n", f[1], load(f[1], strings.Join(f[2:], " ")))
	}
	fmt.Println("all modules done")
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART); err != nil {
		fmt.Println("reboot:", err)
	}
	select {}
}

func load(file, params string) error {
	f, err := os.Open(filepath.Join(dir, file))
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), params, 0)
}
