// SPDX-License-Identifier: Apache-2.0

package vsock_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kata-v2/kata/hypervisor/hypervisortest/guestimage"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/guestsvc"
)

type guestVM struct {
	cmd  *exec.Cmd
	out  *lockedBuffer
	dead chan struct{}
}

func (v *guestVM) console() string { return v.out.String() }

func (v *guestVM) kill() {
	_ = v.cmd.Process.Kill()
	<-v.dead
}

// awaitReady waits until the guest has dialled its ready port.
func (v *guestVM) awaitReady(t *testing.T, ready net.Listener) {
	t.Helper()
	limit := time.AfterFunc(60*time.Second, func() { _ = ready.Close() })
	defer limit.Stop()
	if _, err := ready.Accept(); err != nil {
		t.Fatalf("the guest does not say that it is ready: %v; console:\n%s", err, v.console())
	}
}

// startGuest boots a machine whose vsock is f, which it closes here, with further kernel parameters.
func startGuest(t *testing.T, f *os.File, cpus int, params ...string) *guestVM {
	t.Helper()
	kernel, initrd := guestimage.Kernel(t), guestimage.Initrd(t)
	v := &guestVM{out: &lockedBuffer{}, dead: make(chan struct{})}
	v.cmd = exec.Command("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35,memory-backend=mem", "-accel", "tcg", "-cpu", guestimage.CPU, "-bios", "qboot.rom",
		"-smp", strconv.Itoa(cpus), "-m", "256", "-object", "memory-backend-memfd,id=mem,size=256M,share=on",
		"-chardev", "socket,id=vsock0,fd=3", "-device", "vhost-user-vsock-pci,chardev=vsock0",
		"-serial", "stdio", "-kernel", kernel, "-initrd", initrd, "-append",
		fmt.Sprintf("console=ttyS0 quiet panic=1 %s=%d %s", guestsvc.ReadyParam, readyPort, strings.Join(params, " ")))
	v.cmd.ExtraFiles = []*os.File{f}
	v.cmd.Stdout, v.cmd.Stderr = v.out, v.out
	v.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := v.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	go func() {
		_ = v.cmd.Wait()
		close(v.dead)
	}()
	t.Cleanup(v.kill)
	return v
}
