// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/kata-v2/kata/protocols/agentpb"
)

const (
	// dataLink names the directory that holds a volume's files now. Kubernetes
	// writes a new directory beside it and then replaces the link (kubelet,
	// pkg/volume/util/atomic_writer.go).
	dataLink = "..data"
	// syncedFileName is the name of a volume's only file.
	syncedFileName = "file"
)

// snapshot is what a volume holds: path → file.
type snapshot map[string]*agentpb.SyncedFile

func (s snapshot) bytes() (n int) {
	for _, f := range s {
		n += len(f.Data) + len(f.Path)
	}
	return n
}

// since is what turns old into s: what the link needs first, then the link, then
// what is named by it, then what is not there any more.
func (s snapshot) since(old snapshot) *agentpb.SyncFilesRequest {
	var before, after []*agentpb.SyncedFile
	req := &agentpb.SyncFilesRequest{}
	for _, path := range slices.Sorted(maps.Keys(s)) {
		f := s[path]
		if o := old[path]; o != nil && same(o, f) {
			continue
		}
		if path == "." || strings.HasPrefix(path, "..") && path != dataLink {
			before = append(before, f)
		} else {
			after = append(after, f) // "..data" is before all other names
		}
	}
	req.Files = append(before, after...)
	for _, path := range slices.Sorted(maps.Keys(old)) {
		if s[path] == nil {
			req.Removals = append(req.Removals, path)
		}
	}
	return req
}

func same(a, b *agentpb.SyncedFile) bool {
	return a.Mode == b.Mode && a.Uid == b.Uid && a.Gid == b.Gid && string(a.Data) == string(b.Data)
}

// scan reads the volume as it is.
func (v *volume) scan() (snapshot, error) {
	if v.file {
		return v.scanFile()
	}
	for {
		s, data, err := v.scanDir()
		if !errors.Is(err, fs.ErrNotExist) {
			return s, err
		}
		// Files that vanish do so because the link names another directory by now.
		if now, lerr := os.Readlink(v.path() + "/" + dataLink); lerr != nil || now == data {
			return nil, errors.Join(err, lerr)
		}
	}
}

func (v *volume) scanFile() (snapshot, error) {
	f, err := os.Open(v.path())
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	e, err := entry(syncedFileName, st)
	if err != nil {
		return nil, err
	}
	e.InPlace = true
	most := maxSyncedBytes
	if v.written {
		most = maxWritten
	}
	e.Data, err = readBounded(f, most)
	return snapshot{syncedFileName: e}, err
}

// scanDir reads a directory of Kubernetes and returns what its link names. What
// the link does not name is not finished yet, or not wanted any more.
func (v *volume) scanDir() (s snapshot, data string, err error) {
	root, err := os.OpenRoot(v.path())
	if err != nil {
		return nil, "", err
	}
	defer root.Close()
	if data, err = root.Readlink(dataLink); err != nil {
		return nil, "", fmt.Errorf("it is no volume that Kubernetes writes: %w", err)
	}
	if !strings.HasPrefix(data, "..") || strings.Contains(data, "/") || data == ".." {
		return nil, "", fmt.Errorf("%s names %q, want a directory beside it", dataLink, data)
	}
	s = snapshot{}
	size := 0
	err = fs.WalkDir(root.FS(), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if top, _, _ := strings.Cut(path, "/"); strings.HasPrefix(top, "..") && top != dataLink && top != data {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		e, err := readEntry(root, path, maxSyncedBytes-size)
		if err != nil {
			return err
		}
		s[path] = e
		if size += len(e.Data) + len(path); size > maxSyncedBytes || len(s) > maxSyncedFiles {
			return fmt.Errorf("it has more than %d bytes or %d files", maxSyncedBytes, maxSyncedFiles)
		}
		return nil
	})
	return s, data, err
}

// readEntry reads one file; a symbolic link is taken as it is, never followed.
func readEntry(root *os.Root, path string, room int) (*agentpb.SyncedFile, error) {
	st, err := root.Lstat(path)
	if err != nil {
		return nil, err
	}
	e, err := entry(path, st)
	if err != nil {
		return nil, err
	}
	switch {
	case st.Mode()&fs.ModeSymlink != 0:
		target, err := root.Readlink(path)
		if err != nil {
			return nil, err
		}
		e.Data = []byte(target)
	case st.Mode().IsRegular():
		f, err := root.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if e.Data, err = readBounded(f, room); err != nil {
			return nil, err
		}
	}
	return e, nil
}

func entry(path string, st os.FileInfo) (*agentpb.SyncedFile, error) {
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return nil, fmt.Errorf("%s: no owner is known", path)
	}
	if err := checkKind(sys.Mode); err != nil {
		return nil, err
	}
	return &agentpb.SyncedFile{Path: path, Mode: sys.Mode, Uid: sys.Uid, Gid: sys.Gid}, nil
}

func readBounded(r io.Reader, most int) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, int64(most)+1))
	if err == nil && len(data) > most {
		err = fmt.Errorf("it has more than %d bytes", most)
	}
	return data, err
}
