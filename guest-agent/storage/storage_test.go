// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/protocols/typespb"
)

func TestParseOptions(t *testing.T) {
	for _, c := range []struct {
		in   []string
		want Options
	}{
		{nil, Options{}},
		{[]string{"nosuid", "nodev", "mode=1777", "size=5"}, Options{Flags: unix.MS_NOSUID | unix.MS_NODEV, Data: "mode=1777,size=5"}},
		{[]string{"ro", "rw"}, Options{}},
		{[]string{"rw,ro,lowerdir=/a:/b"}, Options{Flags: unix.MS_RDONLY, Data: "lowerdir=/a:/b"}},
		{[]string{"rbind", "rslave", "", "defaults"}, Options{Flags: unix.MS_BIND | unix.MS_REC, Propagation: unix.MS_SLAVE | unix.MS_REC}},
	} {
		if got := ParseOptions(c.in); got != c.want {
			t.Errorf("%q: %+v, want %+v", c.in, got, c.want)
		}
	}
}

type noModules struct{ err error }

func (n noModules) Ensure(string) error       { return n.err }
func (n noModules) EnsureFS(string) error     { return n.err }
func (n noModules) EnsureModule(string) error { return n.err }

func manager(t *testing.T) *Manager { return NewManager(noModules{}, nil, t.TempDir()) }

func TestLocalCountsUsers(t *testing.T) {
	m := manager(t)
	mp := filepath.Join(t.TempDir(), "vol")
	s := &agentpb.Storage{Driver: "local", MountPoint: mp, Options: []string{"mode=0770", "fsgid=12"}}
	for range 2 {
		if got, err := m.Add(context.Background(), s, "c"); err != nil || got != mp {
			t.Fatal(got, err)
		}
	}
	st, err := os.Stat(mp)
	if err != nil || st.Mode() != os.ModeDir|os.ModeSetgid|0o770 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	for want := 1; want >= 0; want-- {
		if err := m.Remove(mp); err != nil {
			t.Fatal(err)
		}
		if len(m.entries) != want {
			t.Errorf("%d entries, want %d", len(m.entries), want)
		}
	}
	if err := m.Remove(mp); err != nil {
		t.Errorf("removing again: %v", err)
	}
}

func TestSharedStaysUntilTheEnd(t *testing.T) {
	m := manager(t)
	s := &agentpb.Storage{Driver: "local", MountPoint: filepath.Join(t.TempDir(), "v"), Shared: true}
	mp, err := m.Add(context.Background(), s, "c")
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Remove(mp); err != nil || len(m.entries) != 1 {
		t.Errorf("freed with its user: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	dir := t.TempDir()
	for name, c := range map[string]struct {
		s    *agentpb.Storage
		want fault.Kind
	}{
		"driver":   {&agentpb.Storage{Driver: "9p", MountPoint: dir + "/x"}, fault.InvalidArgument},
		"relative": {&agentpb.Storage{Driver: "local", MountPoint: "x"}, fault.InvalidArgument},
		"root":     {&agentpb.Storage{Driver: "local", MountPoint: "/x/.."}, fault.InvalidArgument},
		"option":   {&agentpb.Storage{Driver: "local", MountPoint: dir + "/y", DriverOptions: []string{"encryption_key=ephemeral"}}, fault.Unimplemented},
		"mode":     {&agentpb.Storage{Driver: "local", MountPoint: dir + "/z", Options: []string{"mode=rw"}}, fault.InvalidArgument},
		"huge":     {&agentpb.Storage{Driver: "ephemeral", Fstype: "hugetlbfs", MountPoint: dir + "/h", Options: []string{"pagesize=2M"}}, fault.InvalidArgument},
	} {
		m := manager(t)
		if _, err := m.Add(context.Background(), c.s, "c"); fault.KindOf(err) != c.want {
			t.Errorf("%s: %v", name, err)
		}
		if len(m.entries) != 0 {
			t.Errorf("%s: an entry is left", name)
		}
	}
	boom := errors.New("boom")
	m := NewManager(noModules{boom}, nil, dir)
	_, err := m.Add(context.Background(), &agentpb.Storage{Driver: "virtio-fs", Source: "tag", MountPoint: dir + "/m"}, "")
	if !errors.Is(err, boom) || !strings.Contains(err.Error(), "tag") {
		t.Errorf("got %v", err)
	}
}

func TestFSGroup(t *testing.T) {
	m := manager(t)
	mp := filepath.Join(t.TempDir(), "v")
	if err := os.MkdirAll(mp+"/sub", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(mp+"/sub/f", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s := &agentpb.Storage{Driver: "local", MountPoint: mp, FsGroup: &agentpb.FSGroup{GroupId: 77, GroupChangePolicy: typespb.FSGroupChangePolicy_OnRootMismatch}}
	if _, err := m.Add(context.Background(), s, "c"); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(mp+"/sub/f", &st); err != nil || st.Gid != 77 || st.Mode&0o777 != 0o660 {
		t.Errorf("file %o of group %d, %v", st.Mode, st.Gid, err)
	}
	if err := unix.Stat(mp+"/sub", &st); err != nil || st.Mode&(unix.S_ISGID|0o777) != unix.S_ISGID|0o770 {
		t.Errorf("directory %o, %v", st.Mode, err)
	}
}

func TestParseBytes(t *testing.T) {
	for in, want := range map[string]uint64{"5": 5, "2M": 2 << 20, "1g": 1 << 30, "3k": 3 << 10} {
		if got, err := parseBytes(in); err != nil || got != want {
			t.Errorf("%s: %d, %v", in, got, err)
		}
	}
	for _, bad := range []string{"", "M", "-1", "1T"} {
		if _, err := parseBytes(bad); err == nil {
			t.Errorf("%q accepted", bad)
		}
	}
}
