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

// partSuffix marks a file that has not arrived completely.
const partSuffix = ".kata-part"

// CopyFile writes a file, directory or symbolic link below SharedDir. A file
// comes in pieces (offset, file_size) and takes its name, atomically, with the
// last one. Symbolic links in the path are never followed out of SharedDir.
func (s *Service) CopyFile(_ context.Context, req *agentpb.CopyFileRequest) (*emptypb.Empty, error) {
	rel, err := filepath.Rel(s.SharedDir, filepath.Clean(req.Path))
	if err != nil || !filepath.IsLocal(rel) || rel == "." {
		return nil, fault.New(fault.InvalidArgument, "path %q: want one below %s", req.Path, s.SharedDir)
	}
	if err := os.MkdirAll(s.SharedDir, 0o755); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(s.SharedDir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	if err := makeParents(root, filepath.Dir(rel), os.FileMode(req.DirMode&0o777)); err != nil {
		return nil, fmt.Errorf("copy %s: %w", req.Path, err)
	}
	switch req.FileMode & unix.S_IFMT {
	case unix.S_IFDIR:
		err = copyDir(root, rel, req)
	case unix.S_IFLNK:
		err = copyLink(root, rel, req)
	case unix.S_IFREG, 0:
		err = copyChunk(root, rel, req)
	default:
		err = fault.New(fault.InvalidArgument, "file_mode %#o: want a regular file, directory or symbolic link", req.FileMode)
	}
	if err != nil {
		return nil, fmt.Errorf("copy %s: %w", req.Path, err)
	}
	return empty, nil
}

func makeParents(root *os.Root, dir string, mode os.FileMode) error {
	if dir == "." {
		return nil
	}
	if mode == 0 {
		mode = 0o750
	}
	return root.MkdirAll(dir, mode)
}

func copyDir(root *os.Root, rel string, req *agentpb.CopyFileRequest) error {
	if err := root.Mkdir(rel, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return errors.Join(root.Chown(rel, int(req.Uid), int(req.Gid)), root.Chmod(rel, os.FileMode(req.FileMode&0o777)))
}

// copyLink replaces what has the name, so a link is switched in one step; that
// is how Kubernetes updates a volume of files.
func copyLink(root *os.Root, rel string, req *agentpb.CopyFileRequest) error {
	part := rel + partSuffix
	if err := root.Remove(part); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := root.Symlink(string(req.Data), part); err != nil {
		return err
	}
	return errors.Join(root.Lchown(part, int(req.Uid), int(req.Gid)), root.Rename(part, rel))
}

func copyChunk(root *os.Root, rel string, req *agentpb.CopyFileRequest) error {
	end := req.Offset + int64(len(req.Data))
	if req.Offset < 0 || req.FileSize < 0 || end > req.FileSize {
		return fault.New(fault.InvalidArgument, "offset %d with %d bytes in a file of %d", req.Offset, len(req.Data), req.FileSize)
	}
	if strings.HasSuffix(rel, partSuffix) {
		return fault.New(fault.InvalidArgument, "names that end in %s are taken", partSuffix)
	}
	part := rel + partSuffix
	flags := os.O_WRONLY | os.O_CREATE
	if req.Offset == 0 {
		flags |= os.O_TRUNC
	}
	f, err := root.OpenFile(part, flags, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(req.Data, req.Offset)
	if err == nil && end == req.FileSize {
		// Before the name appears, so that nobody sees it with another owner or mode.
		err = errors.Join(f.Chown(int(req.Uid), int(req.Gid)), f.Chmod(os.FileMode(req.FileMode&0o777)))
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, root.Remove(part))
	}
	if end < req.FileSize {
		return nil
	}
	return root.Rename(part, rel)
}
