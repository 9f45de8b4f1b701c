// SPDX-License-Identifier: Apache-2.0

package inner

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/internal/spawn"
)

// vhostNet: QEMU takes a tap of a network namespace of its own with the kernel's
// vhost-net behind it, both as inherited descriptors. vhostforce makes it an
// error when that does not work.
func vhostNet(t *testing.T) {
	thread := spawn.NewThread()
	defer thread.Close()
	if err := thread.EnterNetNS(""); err != nil {
		t.Fatal(err)
	}
	var tap *os.File
	if err := thread.Do(func() (err error) { tap, err = openTap("tap0"); return err }); err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	vhost, err := os.OpenFile("/dev/vhost-net", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer vhost.Close()
	ctx, cancel := context.WithTimeout(context.Background(), stepTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-S", "-nodefaults", "-no-user-config", "-display", "none",
		"-machine", "q35", "-bios", "qboot.rom", "-accel", "tcg", "-m", "64", "-monitor", "stdio",
		"-netdev", "tap,id=net0,fd=3,vhost=on,vhostforce=on,vhostfd=4", "-device", "virtio-net-pci,netdev=net0,romfile=")
	cmd.ExtraFiles = []*os.File{tap, vhost}
	cmd.Stdin = strings.NewReader("info network\nquit\n")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := thread.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil || !strings.Contains(out.String(), "type=tap") || strings.Contains(out.String(), "vhost") {
		t.Fatalf("QEMU: %v\n%s", err, out.String())
	}
	t.Log("QEMU runs with vhost=on,vhostforce=on on a tap of another network namespace")
}

func openTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}
