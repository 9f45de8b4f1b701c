// SPDX-License-Identifier: Apache-2.0

package rpc

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// Sync brings one volume below SyncedDir to a newer state. Every name that
// changes does so by a rename, in the order of the request, which is what
// workloads that watch a volume of Kubernetes wait for. Symbolic links in paths
// are never followed out of the volume.
func (s *Service) Sync(_ context.Context, req *agentpb.SyncFilesRequest) (*emptypb.Empty, error) {
	if v := req.Volume; !filepath.IsLocal(v) || v == "." || strings.Contains(v, "/") {
		return nil, fault.New(fault.InvalidArgument, "volume %q: want one path element", v)
	}
	dir := filepath.Join(s.SyncedDir, req.Volume)
	if len(req.Files) > 0 {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	root, err := os.OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) { // only removals, of what is gone already
		return empty, nil
	}
	if err != nil {
		return nil, err
	}
	defer root.Close()
	for _, f := range req.Files {
		if err := syncFile(root, f); err != nil {
			return nil, fmt.Errorf("volume %s: %s: %w", req.Volume, f.Path, err)
		}
	}
	for _, path := range req.Removals {
		switch {
		case path == ".":
			err = os.RemoveAll(dir)
		case !filepath.IsLocal(path):
			err = fault.New(fault.InvalidArgument, "want a path in the volume")
		default:
			err = root.RemoveAll(path)
		}
		if err != nil {
			return nil, fmt.Errorf("volume %s: remove %s: %w", req.Volume, path, err)
		}
	}
	return empty, nil
}

func syncFile(root *os.Root, f *agentpb.SyncedFile) error {
	if !filepath.IsLocal(f.Path) || strings.HasSuffix(f.Path, partSuffix) {
		return fault.New(fault.InvalidArgument, "want a path in the volume that does not end in %s", partSuffix)
	}
	own := func(name string) error {
		// The plain number: the mode may have set-gid and sticky bits, which chown clears.
		return errors.Join(root.Lchown(name, int(f.Uid), int(f.Gid)), root.Chmod(name, fileMode(f.Mode)))
	}
	switch f.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if err := root.Mkdir(f.Path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		return own(f.Path)
	case unix.S_IFLNK:
		return copyLink(root, f.Path, &agentpb.CopyFileRequest{Data: f.Data, Uid: int32(f.Uid), Gid: int32(f.Gid)})
	case unix.S_IFREG:
	default:
		return fault.New(fault.InvalidArgument, "mode %#o: want a regular file, directory or symbolic link", f.Mode)
	}
	if f.InPlace {
		if err := overwrite(root, f); !errors.Is(err, fs.ErrNotExist) {
			return errors.Join(err, own(f.Path))
		}
	}
	part := f.Path + partSuffix
	if err := root.WriteFile(part, f.Data, 0o600); err != nil {
		return errors.Join(err, root.Remove(part))
	}
	return errors.Join(own(part), root.Rename(part, f.Path))
}

// overwrite changes a file's content without ever showing it empty.
func overwrite(root *os.Root, f *agentpb.SyncedFile) error {
	file, err := root.OpenFile(f.Path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = file.WriteAt(f.Data, 0)
	return errors.Join(err, file.Truncate(int64(len(f.Data))), file.Close())
}

// fileMode is a mode of stat(2) in Go's words.
func fileMode(mode uint32) os.FileMode {
	m := os.FileMode(mode & 0o777)
	for bit, goBit := range map[uint32]os.FileMode{unix.S_ISUID: os.ModeSetuid, unix.S_ISGID: os.ModeSetgid, unix.S_ISVTX: os.ModeSticky} {
		if mode&bit != 0 {
			m |= goBit
		}
	}
	return m
}
