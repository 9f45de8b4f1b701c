// SPDX-License-Identifier: Apache-2.0

// probe does in a container what its shell has no command for.
//
//	notify DIR: writes "ready" once it watches the directory, and then the name of
//	everything that is renamed there (inotify(7), IN_MOVED_TO), each with the time,
//	in nanoseconds since 1970.
//	listen PATH: a Unix socket; every connection is told "hello".
//	dial PATH: prints what such a socket says.
package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

func main() {
	err := fmt.Errorf("usage: probe notify|listen|dial PATH")
	if len(os.Args) == 3 {
		switch what, path := os.Args[1], os.Args[2]; what {
		case "notify":
			err = watch(path)
		case "listen":
			err = listen(path)
		case "dial":
			err = dial(path)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func listen(path string) error {
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		fmt.Fprintln(c, "hello")
		c.Close()
	}
}

func dial(path string) error {
	c, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = io.Copy(os.Stdout, c)
	return err
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
		at := time.Now().UnixNano()
		if err != nil {
			return err
		}
		// struct inotify_event: 16 bytes, the last four of them the length of the name.
		for b := buf[:n]; len(b) >= syscall.SizeofInotifyEvent; {
			size := int(b[12]) | int(b[13])<<8
			name := b[syscall.SizeofInotifyEvent:][:size]
			b = b[syscall.SizeofInotifyEvent+size:]
			fmt.Printf("%s %d\n", bytes.TrimRight(name, "\x00"), at)
		}
	}
}
