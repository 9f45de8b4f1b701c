// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// The limits that the agent has, and containers inherit when their specification sets none.
const (
	// maxFiles is the limit of open files; the kernel gives PID 1 only 4096.
	maxFiles = 1 << 20
	// maxPending bounds the signals and timers that a user has queued; a host with 16 GiB has it by itself.
	maxPending = 1 << 16
	// maxTasks is the most that the kernel numbers (PID_MAX_LIMIT, include/linux/threads.h).
	maxTasks = "4194304"
)

// RaiseLimits lifts what the kernel derives from the memory that it boots with for
// PID 1 and so for every container: a few hundred processes of a user, threads
// included, in a machine that starts small and grows.
func RaiseLimits() error {
	// syscall, not unix: the runtime then knows that children keep this limit.
	err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: maxFiles, Max: maxFiles})
	return errors.Join(err,
		unix.Setrlimit(unix.RLIMIT_NPROC, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}),
		unix.Setrlimit(unix.RLIMIT_SIGPENDING, &unix.Rlimit{Cur: maxPending, Max: maxPending}))
}

// machineLimits are parameters of the whole guest with the same flaw, of which a
// host's service manager raises the first as well. What is left as a bound is memory,
// and a container's own cgroup, which sockets' buffers count for. Those of TCP and UDP are
// what the kernel gives 1 GiB and more, in pages where they count memory
// (ip-sysctl.rst; net/ipv4/tcp.c, tcp_init).
var machineLimits = []struct{ name, value string }{
	{"kernel/pid_max", maxTasks}, // first: threads are numbered below it
	{"kernel/threads-max", maxTasks},
	{"fs/file-max", "9223372036854775807"},
	{"fs/inotify/max_user_watches", "1048576"}, // the most that the kernel sets by itself
	{"net/ipv4/tcp_mem", "12288 16384 24576"},
	{"net/ipv4/udp_mem", "24576 32768 49152"},
	{"net/ipv4/tcp_rmem", "4096 131072 6291456"},
	{"net/ipv4/tcp_wmem", "4096 16384 4194304"},
	{"net/ipv4/tcp_max_syn_backlog", "1024"},
	{"net/ipv4/tcp_max_orphans", "16384"},
	{"net/ipv4/tcp_max_tw_buckets", "16384"},
}

// RaiseMachineLimits writes machineLimits below dir, which is /proc/sys.
func RaiseMachineLimits(dir string) error {
	var errs []error
	for _, l := range machineLimits {
		if err := os.WriteFile(filepath.Join(dir, l.name), []byte(l.value), 0); err != nil {
			errs = append(errs, fmt.Errorf("sysctl %s=%s: %w", l.name, l.value, err))
		}
	}
	return errors.Join(errs...)
}
