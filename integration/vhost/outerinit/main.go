// SPDX-License-Identifier: Apache-2.0

// Command outerinit is the first process of the machine of integration/vhost: it
// loads the modules beside it, moves to the disk, mounts what a host has – a
// unified cgroup hierarchy above all – runs the tests, says how they ended, and
// ends the machine.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/images/modules"
	"github.com/kata-v2/kata/integration/vhost/inner"
)

// testLimit is for a run that hangs: the machine then says where.
const testLimit = "40m"

func main() {
	status := 1
	if err := prepare(); err != nil {
		fmt.Println("vhost: init:", err)
	} else if status, err = runTests(); err != nil {
		fmt.Println("vhost: init:", err)
		status = 1
	}
	fmt.Printf("%s%d\n", inner.ResultMark, status)
	unix.Sync()
	// The machine runs with -no-reboot.
	fmt.Println("vhost: init: reboot:", unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART))
}

func prepare() error {
	for _, m := range []struct{ source, target, fstype string }{
		{"devtmpfs", "/dev", "devtmpfs"}, {"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"},
	} {
		if err := unix.Mount(m.source, m.target, m.fstype, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	begin := time.Now()
	if err := loadModules("/" + modules.Dir); err != nil {
		return err
	}
	fmt.Printf("vhost: modules loaded in %v\n", time.Since(begin).Round(time.Millisecond))
	if err := moveToDisk(); err != nil {
		return err
	}
	return mountRest()
}

// loadModules loads in the order that modules.Order has written.
func loadModules(dir string) error {
	f, err := os.Open(filepath.Join(dir, "order"))
	if err != nil {
		return err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		fields := strings.Fields(s.Text()) // group, file
		if len(fields) < 2 {
			return fmt.Errorf("module list: line %q", s.Text())
		}
		m, err := os.Open(filepath.Join(dir, fields[1]))
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(m.Fd()), "", 0)
		m.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("load %s: %w", fields[1], err)
		}
	}
	return s.Err()
}

// moveToDisk makes the disk the root. A real root file system is needed: programs
// that confine themselves by pivot_root(2) cannot leave the kernel's first one.
func moveToDisk() error {
	if err := unix.Mount("/dev/vda", "/disk", "ext4", 0, ""); err != nil {
		return fmt.Errorf("mount the disk: %w", err)
	}
	for _, d := range []string{"/dev", "/proc", "/sys"} {
		if err := unix.Mount(d, "/disk"+d, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", d, err)
		}
	}
	if err := unix.Chdir("/disk"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the disk to /: %w", err)
	}
	return errors.Join(unix.Chroot("."), unix.Chdir("/"))
}

func mountRest() error {
	for _, m := range []struct{ fstype, target, options string }{
		{"tmpfs", "/run", "mode=755"}, {"tmpfs", "/tmp", "mode=1777"}, {"devpts", "/dev/pts", "mode=620"},
		{"tmpfs", "/dev/shm", "mode=1777"}, {"cgroup2", "/sys/fs/cgroup", ""},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.fstype, m.target, m.fstype, unix.MS_NOSUID, m.options); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	// As ip(8) makes it on first use, so that it is there before the tests look at
	// what they leave behind.
	const netns = "/run/netns"
	err := errors.Join(os.Mkdir(netns, 0o755), unix.Mount(netns, netns, "", unix.MS_BIND, ""), unix.Mount("", netns, "", unix.MS_SHARED|unix.MS_REC, ""))
	if err != nil {
		return fmt.Errorf("%s: %w", netns, err)
	}
	if err := os.WriteFile("/sys/fs/cgroup/cgroup.subtree_control", []byte("+cpu +cpuset +io +memory +pids"), 0o644); err != nil {
		return fmt.Errorf("cgroup controllers: %w", err)
	}
	return unix.Sethostname([]byte("vhost"))
}

// runTests starts the tests and reaps until they have ended: orphans are ours.
func runTests() (int, error) {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return 0, err
	}
	args := []string{inner.Program, "-test.v", "-test.timeout=" + testLimit}
	for p := range strings.FieldsSeq(string(line)) {
		if pattern, ok := strings.CutPrefix(p, inner.RunParam+"="); ok {
			args = append(args, "-test.run="+pattern)
		}
	}
	if slices.Contains(strings.Fields(string(line)), inner.FailFastParam) {
		args = append(args, "-test.failfast")
	}
	p, err := os.StartProcess(inner.Program, args, &os.ProcAttr{
		Dir: "/root", Files: []*os.File{nil, os.Stdout, os.Stderr},
		Env: []string{
			"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", inner.Env + "=1",
			"KATA_BUILD=" + inner.BuildDir, "KATA_LAB=" + inner.LabDir, "KATA_TEST_KERNEL=" + inner.BuildDir + "/images/vmlinux",
		},
	})
	if err != nil {
		return 0, fmt.Errorf("start the tests: %w", err)
	}
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("wait: %w", err)
		}
		if pid == p.Pid {
			if ws.Signaled() {
				return 128 + int(ws.Signal()), nil
			}
			return ws.ExitStatus(), nil
		}
	}
}
