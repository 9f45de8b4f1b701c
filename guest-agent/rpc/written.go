// SPDX-License-Identifier: Apache-2.0

package rpc

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// writtenEvents are those after which a file may hold something else, or is gone
// (inotify(7): removing a name changes the inode's attributes).
const writtenEvents = unix.IN_MODIFY | unix.IN_CLOSE_WRITE | unix.IN_ATTRIB

// errWatchOver ends a call that waits for changes of a file that is gone now, with
// its pod or its volume: an answer that the host expects, and nobody's failure.
var errWatchOver = errors.New("nothing more will be written")

// Written tells what containers have written into a file that Sync made. It
// compares contents, so nothing is lost between two calls, and what the host has
// sent itself is no news.
func (s *Service) Written(ctx context.Context, req *agentpb.WrittenRequest) (*agentpb.WrittenResponse, error) {
	if v := req.Volume; !filepath.IsLocal(v) || v == "." || strings.Contains(v, "/") {
		return nil, fault.New(fault.InvalidArgument, "volume %q: want one path element", v)
	}
	if !filepath.IsLocal(req.Path) {
		return nil, fault.New(fault.InvalidArgument, "path %q: want one in the volume", req.Path)
	}
	dir := filepath.Join(s.SyncedDir, req.Volume)
	look := func() (*agentpb.WrittenResponse, error) { return written(dir, req) }
	if !req.Wait {
		return look()
	}
	w, err := watchFile(dir, req.Path)
	if err != nil {
		return nil, err
	}
	defer w.Close()
	defer context.AfterFunc(ctx, func() { w.Close() })() // a read under way ends
	buf := make([]byte, 4096)
	for { // looked for after the watch is there, so that no change falls in between
		resp, err := look()
		if fault.KindOf(err) == fault.NotFound {
			return nil, fmt.Errorf("%w: %w", err, errWatchOver)
		}
		if err != nil || resp.Changed {
			return resp, err
		}
		if _, err := w.Read(buf); err != nil {
			return nil, errors.Join(ctx.Err(), fmt.Errorf("volume %s: %s: inotify: %w", req.Volume, req.Path, err))
		}
	}
}

// watchFile is an inotify instance for one file. The path is looked up through a
// descriptor that no symbolic link has led out of the volume.
func watchFile(dir, path string) (*os.File, error) {
	f, err := openSynced(dir, path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	w := os.NewFile(uintptr(fd), "inotify")
	if _, err := unix.InotifyAddWatch(fd, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), writtenEvents); err != nil {
		w.Close()
		return nil, fmt.Errorf("watch %s: %w", path, err)
	}
	return w, nil
}

// openSynced opens a regular file of a volume.
func openSynced(dir, path string) (*os.File, error) {
	root, err := os.OpenRoot(dir)
	if err == nil {
		defer root.Close()
		var f *os.File
		if f, err = root.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0); err == nil {
			if st, serr := f.Stat(); serr == nil && st.Mode().IsRegular() {
				return f, nil
			}
			f.Close()
			return nil, fault.New(fault.InvalidArgument, "%s: want a regular file", path)
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.NotFound, "volume %s has no file %s", filepath.Base(dir), path)
	}
	return nil, err
}

// written compares a file with what the host knows of it.
func written(dir string, req *agentpb.WrittenRequest) (*agentpb.WrittenResponse, error) {
	f, err := openSynced(dir, req.Path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	resp := &agentpb.WrittenResponse{Size: uint64(st.Size())}
	data, err := io.ReadAll(io.LimitReader(f, int64(req.Most)+1))
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w", req.Volume, err)
	}
	if len(data) > int(req.Most) { // known by its size, which is all that the host is told
		known := fmt.Append(nil, st.Size())
		resp.Changed = !bytes.Equal(req.Known, known)
		return resp, nil
	}
	sum := sha256.Sum256(data)
	resp.Size = uint64(len(data))
	if resp.Changed = !bytes.Equal(req.Known, sum[:]); resp.Changed {
		resp.Data = data
	}
	return resp, nil
}
