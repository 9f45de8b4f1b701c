// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/guestsvc"
	"github.com/kata-v2/kata/internal/channel"
)

// addr is a port of the channel.
type addr uint32

func (addr) Network() string  { return "serial" }
func (a addr) String() string { return fmt.Sprint(uint32(a)) }

// runSerial serves over the virtio-serial port, and tells the host so.
func runSerial(modules []string) error {
	for dir, fs := range map[string]string{"/dev": "devtmpfs", "/sys": "sysfs"} {
		if err := unix.Mount(fs, dir, fs, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	events, err := uevents()
	if err != nil {
		return err
	}
	defer events.Close()
	for _, m := range modules {
		if err := load(m); err != nil {
			return fmt.Errorf("load %s: %w", m, err)
		}
	}
	mux := channel.New(channel.Config{Addr: func(_ bool, port uint32) net.Addr { return addr(port) }})
	n := guestsvc.Net{
		Listen: mux.Listen,
		Dial:   func(port uint32) (net.Conn, error) { return mux.Dial(context.Background(), port) },
		Exit:   network.Exit,
	}
	if _, err := guestsvc.Start(n); err != nil {
		return err
	}
	port, err := findPort(events)
	if err != nil {
		return err
	}
	fmt.Println("guestinit: ready")
	if err := channel.Greet(port, func(channel.Hello) error { return nil }); err != nil {
		return err
	}
	return mux.Attach(portConn{port})
}

// findPort opens the port as soon as the kernel has named it.
func findPort(events *os.File) (*os.File, error) {
	buf := make([]byte, 16<<10)
	for {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			b, err := os.ReadFile(n)
			if err == nil && strings.TrimSpace(string(b)) == channel.PortName {
				return os.OpenFile(filepath.Join("/dev", filepath.Base(filepath.Dir(n))), os.O_RDWR|unix.O_NONBLOCK, 0)
			}
		}
		if _, err := events.Read(buf); err != nil {
			return nil, fmt.Errorf("uevents: %w", err)
		}
	}
}

// uevents listens to what the kernel says about devices (NETLINK_KOBJECT_UEVENT, group 1).
func uevents() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("uevents: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("uevents: %w", err)
	}
	return os.NewFile(uintptr(fd), "uevents"), nil
}

// portConn makes a net.Conn of the port.
type portConn struct{ *os.File }

func (portConn) LocalAddr() net.Addr  { return addr(0) }
func (portConn) RemoteAddr() net.Addr { return addr(0) }
