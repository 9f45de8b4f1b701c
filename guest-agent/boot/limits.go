// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
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
	maxTasks = 1 << 22
	// maxWatches is the most that the kernel sets by itself (fs/notify/inotify/inotify_user.c, inotify_user_setup).
	maxWatches = 1 << 20
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

// machineLimits are parameters of the whole guest with the same flaw, which a
// host's service manager raises as well. What is left as a bound is memory,
// and a container's own cgroup.
var machineLimits = []struct {
	name  string
	value int
}{
	{"kernel/pid_max", maxTasks}, // first: threads are numbered below it
	{"kernel/threads-max", maxTasks},
	{"fs/file-max", math.MaxInt64},
	{"fs/inotify/max_user_watches", maxWatches},
}

// RaiseMachineLimits writes machineLimits below dir, which is /proc/sys.
func RaiseMachineLimits(dir string) error {
	var errs []error
	for _, l := range machineLimits {
		if err := os.WriteFile(filepath.Join(dir, l.name), strconv.AppendInt(nil, int64(l.value), 10), 0); err != nil {
			errs = append(errs, fmt.Errorf("sysctl %s=%d: %w", l.name, l.value, err))
		}
	}
	return errors.Join(errs...)
}
