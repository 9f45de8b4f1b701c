// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestDiskOf(t *testing.T) {
	const table = `20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 20 7:0 / /ro ro,relatime shared:5 master:1 - ext4 /dev/loop0 ro
31 20 7:1 / /xfs ro,relatime - xfs /dev/loop1 ro,attr2
32 20 7:2 / /rw ro,relatime - ext4 /dev/loop2 rw
33 20 7:0 /part /part ro,relatime - ext4 /dev/loop0 ro
34 20 7:3 / /top ro,relatime - erofs /dev/loop3 ro
35 34 0:40 / /top/below rw - tmpfs tmpfs rw
36 20 7:4 / /vfat ro - vfat /dev/loop4 ro
37 20 7:5 / /mapped ro,idmapped - ext4 /dev/loop5 ro
38 20 0:41 / /tmpfs ro - tmpfs tmpfs ro
39 20 7:6 /
`
	for _, c := range []struct {
		id        uint64
		recursive bool
		want      string
	}{
		{30, true, "7:0 ext4 ro,noload"},
		{31, true, "7:1 xfs ro,norecovery"},
		{34, false, "7:3 erofs ro"},
		{34, true, "something is mounted below it"},
		{32, true, "the host may write to its file system"},
		{33, true, "it is a part of its file system"},
		{36, true, "its file system is vfat"},
		{37, true, "its mount maps users"},
		{38, true, ""}, {39, true, ""}, {99, true, ""},
	} {
		d, got := diskOf(table, c.id, c.recursive)
		if d != nil {
			got = fmt.Sprintf("%d:%d %s %s", d.Major, d.Minor, d.FSType, strings.Join(d.Options, ","))
		}
		if got != c.want {
			t.Errorf("%d, recursive %t: %q; want %q", c.id, c.recursive, got, c.want)
		}
	}
}

// What is no mount of a device is only shared, without a word.
func TestMountedDiskOfNone(t *testing.T) {
	h := newHost(t)
	s := h.share()
	dir := t.TempDir()
	h.tmpfs(dir+"/memory", "file")
	for _, source := range []string{dir, dir + "/memory", dir + "/memory/file"} {
		h.do(func() error { return unix.Access(source, unix.F_OK) })
		if d, why, err := s.MountedDisk(source, true); d != nil || why != "" || err != nil {
			t.Errorf("%s: %v, %q, %v", source, d, why, err)
		}
	}
	missing := filepath.Join(dir, "missing")
	if _, _, err := s.MountedDisk(missing, true); err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("%v; want an error that names %s", err, missing)
	}
}
