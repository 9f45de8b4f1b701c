// SPDX-License-Identifier: Apache-2.0

package images

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// stampFile remembers, in a directory that only its owner can write, which files
// were verified.
const stampFile = "verified-images.json"

// settle is how old a file's last change must be before a verification of it is
// remembered: within one tick of the file system's clock a second change would
// leave all of its times as they are.
const settle = 2 * time.Second

// identity is what the kernel says about a file. Nobody can set the change time
// (ctime), so the same identity means the same content – for whoever trusts root.
type identity struct {
	Device, Inode uint64
	Size          int64
	MTime, CTime  int64 // nanoseconds since 1970
}

// stamp is the content of stampFile: path → what was verified there.
type stamp map[string]verified

type verified struct {
	Identity identity `json:"identity"`
	SHA256   string   `json:"sha256"`
}

// VerifyCached is VerifyFile for each path, without reading a file again that has
// not changed since it was verified for the same digest: a start costs a few
// stat calls instead of a hash over many megabytes. The memory is one small file
// in dir, which must belong to the caller's user and be writable by nobody else
// – otherwise somebody could plant a verdict – and is made with mode 0700 when
// missing. A stamp that cannot be read or trusted is ignored, never believed.
func (m *Manifest) VerifyCached(dir string, paths ...string) error {
	if err := trustedDir(dir); err != nil {
		return fmt.Errorf("image verification: %w", err)
	}
	name := filepath.Join(dir, stampFile)
	known := readStamp(name)
	changed := false
	for _, path := range paths {
		path, err := filepath.Abs(path)
		if err != nil {
			return fmt.Errorf("image file: %w", err)
		}
		fresh, err := m.verifyUnlessKnown(path, known)
		if err != nil {
			return err
		}
		changed = changed || fresh
	}
	if !changed {
		return nil
	}
	return writeStamp(name, known)
}

// verifyUnlessKnown adds the file to known after it was read; it reports whether it did.
func (m *Manifest) verifyUnlessKnown(path string, known stamp) (bool, error) {
	want, err := m.lookup(path)
	if err != nil {
		return false, err
	}
	file, err := os.Open(path)
	if err != nil {
		return false, fmt.Errorf("image file: %w", err)
	}
	defer file.Close()
	before, err := identify(file)
	if err != nil {
		return false, fmt.Errorf("image file %s: %w", path, err)
	}
	if v, ok := known[path]; ok && v.Identity == before && v.SHA256 == want.SHA256 {
		return false, nil
	}
	if err := m.compare(file, path, want); err != nil {
		return false, err
	}
	after, err := identify(file)
	if err != nil {
		return false, fmt.Errorf("image file %s: %w", path, err)
	}
	if before != after {
		return false, fmt.Errorf("image file %s was changed while it was read", path)
	}
	if time.Since(time.Unix(0, after.CTime)) < settle {
		return false, nil
	}
	known[path] = verified{Identity: after, SHA256: want.SHA256}
	return true, nil
}

func identify(f *os.File) (identity, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return identity{}, err
	}
	return identity{Device: st.Dev, Inode: st.Ino, Size: st.Size, MTime: st.Mtim.Nano(), CTime: st.Ctim.Nano()}, nil
}

// trustedDir makes dir when missing and checks that only we can write it.
func trustedDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return fmt.Errorf("%s is not a directory", dir)
	}
	return onlyOurs(dir, &st)
}

func onlyOurs(path string, st *unix.Stat_t) error {
	if uid := uint32(os.Geteuid()); st.Uid != uid {
		return fmt.Errorf("%s belongs to uid %d: want %d", path, st.Uid, uid)
	}
	if st.Mode&0o022 != 0 {
		return fmt.Errorf("%s has mode %04o: want it writable by its owner only", path, st.Mode&0o7777)
	}
	return nil
}

// readStamp returns an empty stamp for one that is missing, broken or not ours.
func readStamp(name string) stamp {
	known := stamp{}
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return known
	}
	file := os.NewFile(uintptr(fd), name)
	defer file.Close()
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || onlyOurs(name, &st) != nil {
		return known
	}
	if err := json.NewDecoder(file).Decode(&known); err != nil || known == nil {
		return stamp{}
	}
	return known
}

// writeStamp replaces the stamp in one rename, so that shims that start at the
// same time read a whole one; the last writer wins, and what it lacks is only read again.
func writeStamp(name string, known stamp) error {
	for path := range known {
		if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
			delete(known, path)
		}
	}
	data, err := json.Marshal(known)
	if err != nil {
		return fmt.Errorf("image verification: %w", err)
	}
	tmp, err := os.CreateTemp(filepath.Dir(name), ".verified-*")
	if err != nil {
		return fmt.Errorf("image verification: %w", err)
	}
	_, err = tmp.Write(data)
	if err = errors.Join(err, tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), name)
	}
	if err != nil {
		return fmt.Errorf("image verification: %w", errors.Join(err, os.Remove(tmp.Name())))
	}
	return nil
}
