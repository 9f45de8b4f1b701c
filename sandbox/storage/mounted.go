// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// MountedDisk is a block device that the host has mounted and does not write to.
type MountedDisk struct {
	// Major and Minor are the device's number on the host.
	Major, Minor int64
	// FSType is the type of its file system, one that the guest mounts from a disk.
	FSType string
	// Options are those for the guest's mount.
	Options []string
}

// MountedDisk looks at a directory of the host that a container is to have, with
// what is mounted below it if recursive. nil means that it has to be shared; the
// reason is empty for one that is nothing but a directory.
func (s *Share) MountedDisk(source string, recursive bool) (d *MountedDisk, reason string, err error) {
	if err := s.begin(); err != nil {
		return nil, "", err
	}
	defer s.mounting.Done()
	err = s.host.do(func() error {
		var st unix.Statx_t
		if err := unix.Statx(unix.AT_FDCWD, source, 0, unix.STATX_BASIC_STATS|unix.STATX_MNT_ID, &st); err != nil {
			return fmt.Errorf("%s: %w", source, err)
		}
		// Since Linux 5.8 the mount and whether it begins there are known (statx(2)).
		if st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 || st.Mask&unix.STATX_MNT_ID == 0 || st.Dev_major == 0 {
			return nil
		}
		mounts, err := os.ReadFile("/proc/thread-self/mountinfo")
		if err == nil {
			d, reason = diskOf(string(mounts), st.Mnt_id, recursive)
		}
		return err
	})
	return d, reason, err
}

// noReplay keeps the guest's kernel from looking at the journal, which it could
// not write: the host's has replayed it, or was told not to.
var noReplay = map[string]string{"ext4": "noload", "xfs": "norecovery"}

// diskOf finds the disk of a mount by its number in mountinfo (kernel
// Documentation/filesystems/proc.rst, 3.5), or the reason that it cannot be the
// guest's too. As long as one kernel writes to a file system no other one may read it.
func diskOf(mountinfo string, id uint64, recursive bool) (*MountedDisk, string) {
	number := strconv.FormatUint(id, 10)
	var own []string
	for line := range strings.Lines(mountinfo) {
		f := strings.Fields(line)
		if len(f) < 10 {
			continue
		}
		if f[0] == number {
			own = f
		} else if f[1] == number && recursive {
			return nil, "something is mounted below it"
		}
	}
	end := slices.Index(own, "-") // optional fields are before it
	if end < 0 || len(own) < end+4 {
		return nil, ""
	}
	d := &MountedDisk{FSType: own[end+1], Options: []string{"ro"}}
	if _, err := fmt.Sscanf(own[2], "%d:%d", &d.Major, &d.Minor); err != nil || d.Major == 0 {
		return nil, "" // no device of its own
	}
	switch {
	case own[3] != "/":
		return nil, "it is a part of its file system"
	case !slices.Contains(blockTypes, d.FSType):
		return nil, "its file system is " + d.FSType
	case !slices.Contains(strings.Split(own[end+3], ","), "ro"):
		return nil, "the host may write to its file system"
	case slices.Contains(strings.Split(own[5], ","), "idmapped"):
		return nil, "its mount maps users"
	}
	if o := noReplay[d.FSType]; o != "" {
		d.Options = append(d.Options, o)
	}
	return d, ""
}
