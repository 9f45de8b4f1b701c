// SPDX-License-Identifier: Apache-2.0

package rpc

import (
	"context"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols/agentpb"
)

func syncTo(s *Service, r *agentpb.SyncFilesRequest) error {
	_, err := s.Sync(context.Background(), r)
	return err
}

func dirOf(path string) *agentpb.SyncedFile {
	return &agentpb.SyncedFile{Path: path, Mode: unix.S_IFDIR | 0o755}
}

func fileOf(path, data string) *agentpb.SyncedFile {
	return &agentpb.SyncedFile{Path: path, Mode: unix.S_IFREG | 0o640, Uid: 3, Gid: 4, Data: []byte(data)}
}

func linkOf(path, target string) *agentpb.SyncedFile {
	return &agentpb.SyncedFile{Path: path, Mode: unix.S_IFLNK | 0o777, Data: []byte(target)}
}

// A volume of Kubernetes is made, updated by the switch of one link, and removed.
func TestSync(t *testing.T) {
	s := &Service{SyncedDir: t.TempDir() + "/synced"}
	want := func(path, content string) {
		t.Helper()
		if got, err := os.ReadFile(s.SyncedDir + "/" + path); err != nil || string(got) != content {
			t.Errorf("%s: %q, %v; want %q", path, got, err, content)
		}
	}
	top := dirOf(".")
	top.Mode, top.Gid = unix.S_IFDIR|unix.S_ISGID|0o770, 9
	if err := syncTo(s, &agentpb.SyncFilesRequest{Volume: "v", Files: []*agentpb.SyncedFile{
		top, dirOf("..1"), fileOf("..1/key", "one"), linkOf("..data", "..1"), linkOf("key", "..data/key"),
	}}); err != nil {
		t.Fatal(err)
	}
	want("v/key", "one")
	var st unix.Stat_t
	if err := unix.Stat(s.SyncedDir+"/v/key", &st); err != nil || st.Uid != 3 || st.Gid != 4 || st.Mode&0o7777 != 0o640 {
		t.Errorf("file %d:%d %o, %v", st.Uid, st.Gid, st.Mode, err)
	}
	if err := unix.Stat(s.SyncedDir+"/v", &st); err != nil || st.Gid != 9 || st.Mode&0o7777 != unix.S_ISGID|0o770 {
		t.Errorf("volume of group %d %o, %v", st.Gid, st.Mode, err)
	}
	if err := syncTo(s, &agentpb.SyncFilesRequest{Volume: "v", Files: []*agentpb.SyncedFile{
		dirOf("..2"), fileOf("..2/key", "two"), linkOf("..data", "..2"),
	}, Removals: []string{"..1", "gone"}}); err != nil {
		t.Fatal(err)
	}
	want("v/key", "two")
	if left, err := os.ReadDir(s.SyncedDir + "/v"); err != nil || len(left) != 3 {
		t.Errorf("after the update: %v, %v", left, err)
	}
	for range 2 {
		if err := syncTo(s, &agentpb.SyncFilesRequest{Volume: "v", Removals: []string{"."}}); err != nil {
			t.Fatal(err)
		}
	}
	if left, err := os.ReadDir(s.SyncedDir); err != nil || len(left) != 0 {
		t.Errorf("after the removal: %v, %v", left, err)
	}
}

// A file that is mounted by itself stays the same file.
func TestSyncInPlace(t *testing.T) {
	s := &Service{SyncedDir: t.TempDir()}
	var first, second unix.Stat_t
	for _, c := range []struct {
		data string
		st   *unix.Stat_t
	}{{"a longer one", &first}, {"short", &second}} {
		f := fileOf("file", c.data)
		f.InPlace = true
		if err := syncTo(s, &agentpb.SyncFilesRequest{Volume: "f", Files: []*agentpb.SyncedFile{f}}); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(s.SyncedDir + "/f/file"); err != nil || string(got) != c.data {
			t.Errorf("%q, %v", got, err)
		}
		if err := unix.Stat(s.SyncedDir+"/f/file", c.st); err != nil {
			t.Fatal(err)
		}
	}
	if first.Ino != second.Ino {
		t.Error("the file was replaced")
	}
}

func TestSyncStaysInside(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	s := &Service{SyncedDir: dir}
	if err := syncTo(s, &agentpb.SyncFilesRequest{Volume: "v", Files: []*agentpb.SyncedFile{linkOf("out", outside)}}); err != nil {
		t.Fatal(err)
	}
	for name, r := range map[string]*agentpb.SyncFilesRequest{
		"volume up":        {Volume: "..", Files: []*agentpb.SyncedFile{fileOf("x", "")}},
		"volume itself":    {Volume: ".", Removals: []string{"."}},
		"volume deep":      {Volume: "v/w", Files: []*agentpb.SyncedFile{fileOf("x", "")}},
		"no volume":        {Files: []*agentpb.SyncedFile{fileOf("x", "")}},
		"file up":          {Volume: "v", Files: []*agentpb.SyncedFile{fileOf("../x", "")}},
		"file by a link":   {Volume: "v", Files: []*agentpb.SyncedFile{fileOf("out/x", "")}},
		"link by a link":   {Volume: "v", Files: []*agentpb.SyncedFile{linkOf("out/x", "y")}},
		"removal up":       {Volume: "v", Removals: []string{"../v"}},
		"removal by link":  {Volume: "v", Removals: []string{"out/x"}},
		"device":           {Volume: "v", Files: []*agentpb.SyncedFile{{Path: "dev", Mode: unix.S_IFBLK}}},
		"name of a half":   {Volume: "v", Files: []*agentpb.SyncedFile{fileOf("x"+partSuffix, "")}},
		"absolute":         {Volume: "v", Files: []*agentpb.SyncedFile{fileOf("/etc/x", "")}},
		"nothing but dots": {Volume: "...", Files: []*agentpb.SyncedFile{fileOf("..", "")}},
	} {
		if err := syncTo(s, r); err == nil {
			t.Errorf("%s: accepted", name)
		} else if k := fault.KindOf(err); k != fault.InvalidArgument && name != "file by a link" && name != "link by a link" && name != "removal by link" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("outside: %v, %v", left, err)
	}
}
