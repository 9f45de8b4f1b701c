// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// sweepDeadline bounds the wait for a killed process to be gone, in milliseconds.
const sweepDeadline = 5000

// Processes are the pids of this lab's processes, the daemon and ctr commands
// included: all that have inherited its environment mark, and all that name a
// path of a temporary Root in their arguments, as a VMM with an environment of
// its own does.
func (c *Containerd) Processes() ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("lab: processes: %w", err)
	}
	mark := []byte("\x00" + rootEnv + "=" + c.Root + "\x00")
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		// A process that ends meanwhile cannot be read: it is none of ours any more.
		env, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		marked := bytes.Contains(append([]byte{0}, env...), mark)
		cmdline, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if marked || c.ownsRoot && bytes.Contains(cmdline, []byte(c.Root+"/")) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// sweepProcesses kills what is left of the lab after the daemon has ended.
func (c *Containerd) sweepProcesses() error {
	pids, err := c.Processes()
	if err != nil {
		return err
	}
	errs := make([]error, 0, len(pids))
	for _, pid := range pids {
		errs = append(errs, killAndWait(pid))
	}
	return errors.Join(errs...)
}

// killAndWait ends a process that should not be there and reports it.
func killAndWait(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pidfd of %d: %w", pid, err)
	}
	defer unix.Close(fd)
	cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	name := strings.TrimSpace(strings.ReplaceAll(string(cmdline), "\x00", " "))
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return fmt.Errorf("kill %d (%s): %w", pid, name, err)
	}
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, sweepDeadline); err != nil || n == 0 {
		return fmt.Errorf("process %d (%s) was left and did not end within %d ms of SIGKILL: %w", pid, name, sweepDeadline, err)
	}
	return fmt.Errorf("process %d (%s) was left and had to be killed", pid, name)
}

// sweepMounts detaches every mount below the lab's directories, newest first.
func (c *Containerd) sweepMounts() error {
	points, err := mountsBelow(c.Root)
	if err != nil {
		return err
	}
	var errs []error
	for i := len(points) - 1; i >= 0; i-- {
		errs = append(errs, fmt.Errorf("mount %s was left", points[i]))
		if err := unix.Unmount(points[i], unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", points[i], err))
		}
	}
	return errors.Join(errs...)
}

// mountsBelow lists mount points below dir in this mount namespace, in mount order.
func mountsBelow(dir string) ([]string, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("lab: mounts: %w", err)
	}
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	var points []string
	for line := range strings.Lines(string(data)) {
		// proc_pid_mountinfo(5): the fifth field is the mount point.
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		if p := unescape.Replace(f[4]); strings.HasPrefix(p, dir+"/") {
			points = append(points, p)
		}
	}
	return points, nil
}

// removeMachineDirs removes the directories outside the lab's root that ctr,
// containerd's runc shim and runc make on demand and never remove, where they
// are empty. Whoever made them is not asked: of labs that overlap, the last one
// cleans up, and every user makes them again when needed.
func removeMachineDirs(namespace string) {
	dirs := []string{"/run/containerd/s", "/run/containerd/fifo", "/run/containerd/runc/" + namespace, "/run/containerd/runc", "/run/containerd"}
	hierarchies, _ := filepath.Glob("/sys/fs/cgroup/*")
	for _, h := range append(hierarchies, "/sys/fs/cgroup") {
		dirs = append(dirs, filepath.Join(h, namespace))
	}
	for _, dir := range dirs {
		// A directory that is missing or in use stays as it is.
		_ = unix.Rmdir(dir)
	}
}
