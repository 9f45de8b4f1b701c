// SPDX-License-Identifier: Apache-2.0

// Package storagetest gives tests that mount a mount namespace of their own, so
// that nothing of theirs reaches the host or outlives them.
package storagetest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// envInside marks the process that runs in the namespace.
const envInside = "KATA_TEST_MOUNT_NAMESPACE"

// Main is a package's TestMain: it runs the tests in a child process in a mount
// namespace of its own and returns the exit status. Root is needed.
func Main(m *testing.M) int {
	if os.Getenv(envInside) != "" {
		os.Unsetenv(envInside)
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			fmt.Fprintln(os.Stderr, "private mounts:", err)
			return 1
		}
		return m.Run()
	}
	runtime.LockOSThread() // the child dies with the thread that forked it
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), envInside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return max(1, exit.ExitCode())
	case err != nil:
		fmt.Fprintln(os.Stderr, "test process in a mount namespace (needs root):", err)
		return 1
	}
	return 0
}

// Mounts are the mount points at or below dir in this process's namespace.
func Mounts(t testing.TB, dir string) (out []string) {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo") // fields: kernel Documentation/filesystems/proc.rst, 3.5
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(strings.TrimSpace(string(data)), "\n") {
		f := strings.Fields(line)
		if len(f) < 5 {
			t.Fatalf("mountinfo: %q", line)
		}
		if p := unescape(f[4]); p == dir || strings.HasPrefix(p, dir+"/") {
			out = append(out, p)
		}
	}
	return out
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
