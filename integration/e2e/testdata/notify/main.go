// SPDX-License-Identifier: Apache-2.0

// notify writes "ready" once it watches the directory that it is told, and then
// the name of everything that is renamed there (inotify(7), IN_MOVED_TO).
package main

import (
	"bytes"
	"fmt"
	"os"
	"syscall"
)

func main() {
	if err := watch(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "notify:", err)
		os.Exit(1)
	}
}

func watch(dir string) error {
	fd, err := syscall.InotifyInit()
	if err != nil {
		return err
	}
	if _, err := syscall.InotifyAddWatch(fd, dir, syscall.IN_MOVED_TO); err != nil {
		return err
	}
	fmt.Println("ready")
	for buf := make([]byte, 4096); ; {
		n, err := syscall.Read(fd, buf)
		if err != nil {
			return err
		}
		// struct inotify_event: 16 bytes, the last four of them the length of the name.
		for b := buf[:n]; len(b) >= syscall.SizeofInotifyEvent; {
			size := int(b[12]) | int(b[13])<<8
			name := b[syscall.SizeofInotifyEvent:][:size]
			b = b[syscall.SizeofInotifyEvent+size:]
			fmt.Printf("%s\n", bytes.TrimRight(name, "\x00"))
		}
	}
}
