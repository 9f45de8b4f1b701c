// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// loopOf is a block device of a file, as a device of a specification.
func loopOf(b *box, path string, size int64) specs.LinuxDevice {
	b.Helper()
	file := writeFile(b.T, "", b.TempDir(), filepath.Base(path))
	if err := os.Truncate(file, size); err != nil {
		b.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", file).Output()
	if err != nil {
		b.Fatalf("losetup: %v", err)
	}
	dev := strings.TrimSpace(string(out))
	b.Cleanup(func() {
		if err := exec.Command("losetup", "--detach", dev).Run(); err != nil {
			b.Errorf("losetup --detach %s: %v", dev, err)
		}
	})
	var st unix.Stat_t
	if err := unix.Stat(dev, &st); err != nil {
		b.Fatal(err)
	}
	return specs.LinuxDevice{Path: path, Type: "b", Major: int64(unix.Major(st.Rdev)), Minor: int64(unix.Minor(st.Rdev))}
}

// testIORate: a rate for one of two block devices, under the host's number, holds
// for that one in the guest: reading is not faster than it. Nothing is said about
// how much slower, which is the machine's.
func testIORate(b *box) {
	const size, rate = 4 << 20, 2 << 20
	s := script(b.T, `now() { read a b </proc/uptime; echo ${a%.*}${a#*.}; }
		for d in slow fast; do t=$(now); cat /dev/$d >/dev/null || exit; echo $(($(now) - t)); done
		test "$(cut -d' ' -f1 /sys/fs/cgroup/io.max)" = "$(printf %d:%d 0x$(stat -c %t /dev/slow) 0x$(stat -c %T /dev/slow))" && echo translated`)
	slow := loopOf(b, "/dev/slow", size)
	s.Linux.Devices = []specs.LinuxDevice{slow, loopOf(b, "/dev/fast", size)}
	for i := range s.Linux.Devices {
		d := &s.Linux.Devices[i]
		s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: "b", Major: &d.Major, Minor: &d.Minor, Access: "r"})
	}
	limit := specs.LinuxThrottleDevice{Rate: rate}
	limit.Major, limit.Minor = slow.Major, slow.Minor
	s.Linux.Resources.BlockIO = &specs.LinuxBlockIO{ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{limit}}
	r := b.runSpec("iorate", s)
	lines := strings.Fields(r.Stdout)
	if len(lines) != 3 || lines[2] != "translated" {
		b.Fatalf("%+v", r)
	}
	took, err := strconv.Atoi(lines[0]) // hundredths of a second
	if want := 100 * size / rate; err != nil || took*10 < want*9 {
		b.Errorf("%d bytes at %d bytes/s were read in %d hundredths of a second; want at least %d, less a tenth", size, rate, took, want)
	}
	b.Logf("4 MiB: %s hundredths of a second at 2 MiB/s, %s without a limit", lines[0], lines[1])
}

// testMissingDevice: a character device that only the host has is refused by name.
func testMissingDevice(b *box) {
	s := script(b.T, "true")
	s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/nowhere", Type: "c", Major: 240, Minor: 77}}
	if r := b.runSpec("nowhere", s); r.Code == 0 || !strings.Contains(r.Stderr, "linux.devices (/dev/nowhere): the guest has no character device") {
		b.Errorf("%+v", r)
	}
}
