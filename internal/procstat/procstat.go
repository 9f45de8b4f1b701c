// SPDX-License-Identifier: Apache-2.0

// Package procstat reads what other processes of this host use.
package procstat

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// PSS is the proportional set size of the processes together, in bytes: what they
// alone have in memory, and their share of what they have in common with others
// (proc_pid_smaps(5), smaps_rollup).
func PSS(pids ...int) (int64, error) {
	var kib int64
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			return 0, fmt.Errorf("memory of process %d: %w", pid, err)
		}
		n, err := Field(string(b), "Pss")
		if err != nil {
			return 0, fmt.Errorf("memory of process %d: %w", pid, err)
		}
		kib += n
	}
	return kib << 10, nil
}

// Field reads the line "<name>: <n> kB" of a file of /proc, in KiB.
func Field(text, name string) (int64, error) {
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == name+":" && f[2] == "kB" {
			return strconv.ParseInt(f[1], 10, 64)
		}
	}
	return 0, fmt.Errorf("no line %q in %q", name+": <n> kB", text)
}

// CPUTime is what a process has used of the CPU, all threads together, ended
// ones included, in the kernel's resolution of nanoseconds: /proc/<pid>/stat
// counts in hundredths of a second, more than an idle shim uses in a minute.
func CPUTime(pid int) (time.Duration, error) {
	// clock_getcpuclockid(3): the clock of another process is ^pid << 3 with the
	// kind in the low bits; 2 is CPUCLOCK_SCHED (linux/posix-timers.h).
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid)<<3|2, &ts); err != nil {
		return 0, fmt.Errorf("CPU clock of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}
