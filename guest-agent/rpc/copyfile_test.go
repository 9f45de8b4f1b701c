// SPDX-License-Identifier: Apache-2.0

package rpc

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols/agentpb"
)

func copyTo(s *Service, r *agentpb.CopyFileRequest) error {
	_, err := s.CopyFile(context.Background(), r)
	return err
}

func TestCopyFileInPieces(t *testing.T) {
	dir := t.TempDir()
	s := &Service{SharedDir: dir}
	path := dir + "/a/b/f"
	piece := func(off int64, data string) error {
		return copyTo(s, &agentpb.CopyFileRequest{Path: path, FileSize: 6, FileMode: 0o640, DirMode: 0o755, Uid: 5, Gid: 6, Offset: off, Data: []byte(data)})
	}
	if err := piece(0, "abc"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("the name appears before the file is complete")
	}
	if err := piece(3, "def"); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	b, err := os.ReadFile(path)
	if err != nil || string(b) != "abcdef" {
		t.Errorf("%q, %v", b, err)
	}
	if err := unix.Stat(path, &st); err != nil || st.Uid != 5 || st.Gid != 6 || st.Mode&0o777 != 0o640 {
		t.Errorf("%d:%d %o, %v", st.Uid, st.Gid, st.Mode, err)
	}
	if err := piece(4, "xyz"); fault.KindOf(err) != fault.InvalidArgument {
		t.Errorf("past the end: %v", err)
	}
	if left, _ := filepath.Glob(dir + "/a/b/*" + partSuffix); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestCopyDirAndLink(t *testing.T) {
	dir := t.TempDir()
	s := &Service{SharedDir: dir}
	if err := copyTo(s, &agentpb.CopyFileRequest{Path: dir + "/d", FileMode: unix.S_IFDIR | 0o711}); err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{"one", "two"} { // the second replaces the first
		if err := copyTo(s, &agentpb.CopyFileRequest{Path: dir + "/d/l", FileMode: unix.S_IFLNK, Data: []byte(target)}); err != nil {
			t.Fatal(err)
		}
		if got, err := os.Readlink(dir + "/d/l"); err != nil || got != target {
			t.Errorf("link to %q, %v", got, err)
		}
	}
}

func TestCopyStaysInside(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	s := &Service{SharedDir: dir}
	if err := os.Symlink(outside, dir+"/out"); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/etc/x", dir, dir + "/../x", "x", dir + "/out/x"} {
		if err := copyTo(s, &agentpb.CopyFileRequest{Path: path, FileSize: 1, Data: []byte("x")}); err == nil {
			t.Errorf("%s was written", path)
		}
	}
	if got, _ := os.ReadDir(outside); len(got) != 0 {
		t.Errorf("outside: %v", got)
	}
	if err := copyTo(s, &agentpb.CopyFileRequest{Path: dir + "/dev", FileMode: unix.S_IFBLK}); fault.KindOf(err) != fault.InvalidArgument {
		t.Errorf("a device: %v", err)
	}
}

func TestStatus(t *testing.T) {
	for k, c := range kindCodes {
		if got := status.Code(toStatus(fault.New(k, "x"))); got != c {
			t.Errorf("kind %d: %v, want %v", k, got, c)
		}
	}
	if got := status.Code(toStatus(os.ErrClosed)); got != codes.Internal {
		t.Errorf("an unmarked error: %v", got)
	}
	if got := status.Code(toStatus(status.Error(codes.Aborted, "x"))); got != codes.Aborted {
		t.Errorf("a status: %v", got)
	}
}
