// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// loopOf is a block device of a file, and the same as a device of a specification.
func loopOf(b *box, path string, size int64) (dev string, d specs.LinuxDevice) {
	b.Helper()
	file := writeFile(b.T, "", b.TempDir(), filepath.Base(path))
	if err := os.Truncate(file, size); err != nil {
		b.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", file).Output()
	if err != nil {
		b.Fatalf("losetup: %v", err)
	}
	dev = strings.TrimSpace(string(out))
	b.Cleanup(func() {
		if err := exec.Command("losetup", "--detach", dev).Run(); err != nil {
			b.Errorf("losetup --detach %s: %v", dev, err)
		}
	})
	var st unix.Stat_t
	if err := unix.Stat(dev, &st); err != nil {
		b.Fatal(err)
	}
	return dev, specs.LinuxDevice{Path: path, Type: "b", Major: int64(unix.Major(st.Rdev)), Minor: int64(unix.Minor(st.Rdev))}
}

// testIORate: a rate for one of two block devices, under the host's number, holds
// for that one in the guest: reading is not faster than it. Nothing is said about
// how much slower, which is the machine's.
func testIORate(b *box) {
	s := script(b.T, `now() { read a b </proc/uptime; echo ${a%.*}${a#*.}; }
		for d in slow fast; do t=$(now); cat /dev/$d >/dev/null || exit; echo $(($(now) - t)); done
		test "$(cut -d' ' -f1 /sys/fs/cgroup/io.max)" = "$(printf %d:%d 0x$(stat -c %t /dev/slow) 0x$(stat -c %T /dev/slow))" && echo translated`)
	_, slow := loopOf(b, "/dev/slow", rated)
	_, fast := loopOf(b, "/dev/fast", rated)
	s.Linux.Devices = []specs.LinuxDevice{slow, fast}
	for i := range s.Linux.Devices {
		d := &s.Linux.Devices[i]
		s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: "b", Major: &d.Major, Minor: &d.Minor, Access: "r"})
	}
	s.readRate(slow)
	r := b.runSpec("iorate", s)
	lines := strings.Fields(r.Stdout)
	if len(lines) != 3 || lines[2] != "translated" {
		b.Fatalf("%+v", r)
	}
	b.notFaster(lines[0])
	b.Logf("%s hundredths of a second without a limit", lines[1])
}

// What is read of a device at what rate: in bytes, and in bytes a second.
const rated, rate = 4 << 20, 2 << 20

// readRate limits reading from a device of the host.
func (s *spec) readRate(d specs.LinuxDevice) {
	limit := specs.LinuxThrottleDevice{Rate: rate}
	limit.Major, limit.Minor = d.Major, d.Minor
	s.Linux.Resources.BlockIO = &specs.LinuxBlockIO{ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{limit}}
}

// notFaster checks the time of reading, in hundredths of a second of the guest.
func (b *box) notFaster(took string) {
	b.Helper()
	n, err := strconv.Atoi(took)
	if want := 100 * rated / rate; err != nil || n*10 < want*9 {
		b.Errorf("%d bytes at %d bytes/s were read in %q hundredths of a second; want at least %d, less a tenth", rated, rate, took, want)
	}
	b.Logf("%d bytes at %d bytes/s: %s hundredths of a second", rated, rate, took)
}

// TestSharedIORate: a rate for the device that a shared directory is on holds for
// the pod's virtio-fs daemon, and so for what the container reads.
func TestSharedIORate(t *testing.T) {
	b := newBox(t)
	dev, d := loopOf(b, "/dev/shared", 4*rated)
	dir := t.TempDir()
	b.host("mkfs.ext4", "-q", dev)
	b.host("mount", dev, dir)
	t.Cleanup(func() { b.host("umount", dir) })
	writeFile(t, strings.Repeat("x", rated), dir, "file")
	b.host("umount", dir) // nothing of it is in memory when it is mounted again
	b.host("mount", dev, dir)
	s := newSpec(t, "sh", "-c", `now() { read a b </proc/uptime; echo ${a%.*}${a#*.}; }; t=$(now); wc -c </shared/file; echo $(($(now) - t))`).
		mount("bind", dir, "/shared", "rbind", "ro")
	s.readRate(d)
	r := b.runSpec("sharedrate", s)
	lines := strings.Fields(r.Stdout)
	if len(lines) != 2 || lines[0] != strconv.Itoa(rated) {
		t.Fatalf("%+v", r)
	}
	b.notFaster(lines[1])
}

// host runs a command of this machine.
func (b *box) host(name string, args ...string) {
	b.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		b.Errorf("%s %v: %v: %s", name, args, err, out)
	}
}

// testMissingDevice: a character device that only the host has is refused by name.
func testMissingDevice(b *box) {
	s := script(b.T, "true")
	s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/nowhere", Type: "c", Major: 240, Minor: 77}}
	if r := b.runSpec("nowhere", s); r.Code == 0 || !strings.Contains(r.Stderr, "linux.devices (/dev/nowhere): the guest has no character device") {
		b.Errorf("%+v", r)
	}
}
