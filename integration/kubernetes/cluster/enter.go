// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// stageEnv says which life of the program this is: unset, stageInit or stageMain.
const (
	stageEnv  = "KATA_KUBERNETES_STAGE"
	stageInit = "init"
	stageMain = "main"
)

// private are the directories in which kubelet, kube-proxy and CNI have fixed
// paths. They are empty and in memory for the cluster.
var private = []string{"/run", "/var/lib", "/var/log"}

// Enter gives the calling program pid and mount namespaces of its own: it starts
// the program again as their first process, which prepares them and starts it
// once more, and there Enter returns. In the other two lives it exits with that
// one's status. However the program ends, the kernel ends everything that it
// left running. Mounts propagate as on a host that systemd has started: the
// shims have mount namespaces too, and need to see what the kubelet mounts.
func Enter() error {
	switch os.Getenv(stageEnv) {
	case stageMain:
		return nil
	case stageInit:
		if err := seclude(); err != nil {
			return err
		}
		code, err := superviseMain()
		if err != nil {
			return err
		}
		os.Exit(code)
	}
	// The parent-death signal is tied to the thread that forks.
	runtime.LockOSThread()
	cmd := again(stageInit)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return fmt.Errorf("cluster: namespaces of its own (root is needed): %w", err)
	}
	os.Exit(cmd.ProcessState.ExitCode())
	return nil
}

// again is this program with the same arguments, in its next life.
func again(stage string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), stageEnv+"="+stage)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd
}

func seclude() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("cluster: take / out of the machine's mount propagation: %w", err)
	}
	for _, dir := range private {
		if err := unix.Mount("cluster", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
			return fmt.Errorf("cluster: an empty %s: %w", dir, err)
		}
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("cluster: /proc of the pid namespace: %w", err)
	}
	if err := makeHost(); err != nil {
		return err
	}
	// Where ip(8) keeps names of network namespaces.
	if err := os.MkdirAll("/run/netns", 0o755); err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("cluster: share / with what the node starts: %w", err)
	}
	return nil
}

// superviseMain runs the program's last life and is the parent of whatever
// loses its own, as the first process of a pid namespace.
func superviseMain() (int, error) {
	runtime.LockOSThread()
	cmd := again(stageMain)
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("cluster: %w", err)
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("cluster: wait: %w", err)
		case pid == cmd.Process.Pid && status.Exited():
			return status.ExitStatus(), nil
		case pid == cmd.Process.Pid && status.Signaled():
			return 128 + int(status.Signal()), nil
		}
	}
}
