// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/kata-v2/kata/hypervisor/qemu"
	"github.com/kata-v2/kata/images"
	"github.com/kata-v2/kata/integration/vhost/inner"
	"github.com/kata-v2/kata/internal/spawn"
)

// codeCacheMiB bounds the code that the emulator keeps: a kernel, a containerd,
// and above all what the emulators inside make at run time.
const codeCacheMiB = 1024

// clock prints lines with the time since it was made.
type clock struct {
	w     io.Writer
	begin time.Time
}

func newClock(w io.Writer) *clock { return &clock{w, time.Now()} }

func (c *clock) say(format string, args ...any) {
	fmt.Fprintf(c.w, "[%7.1fs] %s\n", time.Since(c.begin).Seconds(), fmt.Sprintf(format, args...))
}

// boot runs the machine to its end and returns what its tests said.
func boot(ctx context.Context, o options, c *clock, disk, initrd string) (err error) {
	log, err := os.Create(filepath.Join(o.dir, "console.log"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	console, stdout, err := os.Pipe()
	if err != nil {
		return err
	}
	defer console.Close()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", arguments(o, disk, initrd)...)
	cmd.Stdout, cmd.Stderr = stdout, stdout
	thread := spawn.NewThread() // the machine dies with this process
	defer thread.Close()
	err = thread.Start(cmd)
	stdout.Close()
	if err != nil {
		return err
	}
	status := follow(console, c, log)
	if werr := cmd.Wait(); werr != nil || ctx.Err() != nil {
		return errors.Join(fmt.Errorf("the machine ended early, its console is in %s", log.Name()), werr, ctx.Err())
	}
	switch status {
	case 0:
		return nil
	case -1:
		return fmt.Errorf("the machine ended without a result, its console is in %s", log.Name())
	}
	return fmt.Errorf("the tests ended with status %d; the whole console is in %s", status, log.Name())
}

// follow copies the console line by line and returns the tests' exit status, -1
// when the machine ended before there was one.
func follow(console io.Reader, c *clock, log io.Writer) (status int) {
	timed := clock{w: log, begin: c.begin}
	status = -1
	s := bufio.NewScanner(console)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		line := strings.TrimRight(s.Text(), "\r")
		timed.say("%s", line)
		c.say("%s", line)
		if _, after, ok := strings.Cut(line, inner.ResultMark); ok {
			if n, err := strconv.Atoi(strings.TrimSpace(after)); err == nil {
				status = n
			}
		}
	}
	return status
}

func arguments(o options, disk, initrd string) []string {
	return []string{
		"-name", "vhost-host", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-machine", "q35,graphics=off,smbus=off,hpet=off,vmport=off", "-bios", "qboot.rom",
		"-accel", "tcg,thread=multi,tb-size=" + strconv.Itoa(codeCacheMiB), "-cpu", qemu.CPUModel(qemu.TCG),
		"-smp", strconv.Itoa(o.cpus), "-m", strconv.Itoa(o.memory),
		"-drive", "if=none,id=root,format=raw,cache=unsafe,file=" + disk, "-device", "virtio-blk-pci,drive=root",
		"-serial", "stdio", "-kernel", filepath.Join(o.images, images.KernelFile), "-initrd", initrd,
		"-append", kernelCommandLine(o),
	}
}

func kernelCommandLine(o options) string {
	p := []string{
		"console=ttyS0", "quiet", "panic=-1", "reboot=t", "tsc=reliable", "no_timer_check", "mitigations=off", "nokaslr",
		"random.trust_cpu=on", "cryptomgr.notests", "net.ifnames=0", "cgroup_no_v1=all",
	}
	if o.run != "" {
		p = append(p, inner.RunParam+"="+o.run)
	}
	if o.failFast {
		p = append(p, inner.FailFastParam)
	}
	return strings.Join(p, " ")
}
