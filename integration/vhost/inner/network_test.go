// SPDX-License-Identifier: Apache-2.0

package inner

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/integration/lab"
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

// wired is a pod's namespace with eth0, whose peer greets on TCP port 80.
func wired(t *testing.T) *lab.NetNS {
	pod, outside := lab.NewNetNS(t), lab.NewNetNS(t)
	pod.Veth("eth0", outside, "host0")
	pod.Addr("eth0", "10.77.0.2/24")
	outside.Addr("host0", "10.77.0.1/24")
	l := outside.Listen("10.77.0.1:80")
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n, err := io.Copy(c, io.LimitReader(zeros{}, pageSize))
			t.Logf("network: sent %d bytes to %v (%v)", n, c.RemoteAddr(), err)
			_ = c.Close()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
	return pod
}

// pageSize is what the server sends, in bytes.
const pageSize = 1 << 20

type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}

// network: the pod's device is a tap with the kernel's vhost-net behind it, and
// carries what it should.
func (b box) network(p pod) {
	var vhosts int
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.vmm))
	if err != nil {
		b.Fatal(err)
	}
	for _, fd := range fds {
		if target, _ := os.Readlink(fd); target == "/dev/vhost-net" {
			vhosts++
		}
	}
	args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.vmm))
	if err != nil || vhosts == 0 || !bytes.Contains(args, []byte(",vhost=on,vhostfds=")) {
		b.Errorf("QEMU of pod %s has %d times /dev/vhost-net open (%v)", p.id, vhosts, err)
	}
	begin := time.Now()
	out := b.mustCtr(b.execArgs(p.id, "net", "sh", "-c", "ping -c 1 -W 60 10.77.0.1 >&2 && nc 10.77.0.1 80 </dev/null | wc -c")...)
	if strings.TrimSpace(out) != strconv.Itoa(pageSize) {
		b.Errorf("pod %s got %q bytes over TCP; want %d", p.id, out, pageSize)
	}
	b.Logf("pod %s: %s bytes over TCP through vhost-net, %v with exec and ping", p.id, strings.TrimSpace(out), time.Since(begin).Round(time.Millisecond))
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
