// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// MemoryVolume describes a directory of the host that is a file system in memory
// by itself: what its like in the guest is to be.
type MemoryVolume struct {
	// PageBytes is the size of its huge pages; 0 for a tmpfs.
	PageBytes uint64
	// Bytes is its size; 0 when it has no bound.
	Bytes uint64
	// Mode (permissions), UID and GID of its root directory.
	Mode, UID, GID uint32
}

// MemoryVolume looks at a directory of the host; nil means that it is not the
// root of a tmpfs or of a file system of huge pages.
func (s *Share) MemoryVolume(source string) (v *MemoryVolume, err error) {
	if err := s.begin(); err != nil {
		return nil, err
	}
	defer s.mounting.Done()
	err = s.host.do(func() (err error) {
		v, err = memoryVolume(source)
		return err
	})
	return v, err
}

func memoryVolume(source string) (*MemoryVolume, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, source, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, &st); err != nil {
		return nil, fmt.Errorf("%s: %w", source, err)
	}
	// Whether it is a mount is known since Linux 5.8 (statx(2), STATX_ATTR_MOUNT_ROOT).
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return nil, nil
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(source, &fs); err != nil {
		return nil, fmt.Errorf("%s: %w", source, err)
	}
	v := &MemoryVolume{Mode: uint32(st.Mode) & 0o7777, UID: st.Uid, GID: st.Gid}
	switch fs.Type {
	case unix.TMPFS_MAGIC:
		v.Bytes = fs.Blocks * uint64(fs.Bsize)
	case unix.HUGETLBFS_MAGIC:
		v.PageBytes = uint64(fs.Bsize) // a mount without a bound counts the host's pages, so its size says nothing
	default:
		return nil, nil
	}
	return v, nil
}
