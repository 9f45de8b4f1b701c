// SPDX-License-Identifier: Apache-2.0

package template

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// sealed is what nobody can do to the memory that clones share: change, grow or
// shrink it. Private mappings, which is what clones have, may be written.
const sealed = unix.F_SEAL_WRITE | unix.F_SEAL_GROW | unix.F_SEAL_SHRINK | unix.F_SEAL_SEAL

// chunk is how much is looked at or copied at a time, page what is dropped when it is zero.
const (
	chunk = 1 << 20
	page  = 4 << 10
)

// NewMemory makes an anonymous file of that many bytes.
func NewMemory(size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate("guest-memory", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("memory: %w", os.NewSyscallError("memfd_create", err))
	}
	f := os.NewFile(uintptr(fd), "guest-memory")
	if err := f.Truncate(size); err != nil {
		f.Close()
		return nil, fmt.Errorf("memory: %w", err)
	}
	return f, nil
}

// extents calls f for every part of a sparse file that may be other than zero.
func extents(src *os.File, f func(off, n int64) error) error {
	st, err := src.Stat()
	if err != nil {
		return err
	}
	for off := int64(0); off < st.Size(); {
		from, err := unix.Seek(int(src.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // the rest is a hole
		}
		if err != nil {
			return os.NewSyscallError("lseek", err)
		}
		to, err := unix.Seek(int(src.Fd()), from, unix.SEEK_HOLE)
		if err != nil {
			return os.NewSyscallError("lseek", err)
		}
		for ; from < to; from += chunk {
			if err := f(from, min(chunk, to-from)); err != nil {
				return err
			}
		}
		off = to
	}
	return nil
}

// copySparse copies what is not zero and returns a digest of all of it, when sum is set.
func copySparse(dst, src *os.File, sum bool) (string, error) {
	var h hash.Hash
	if sum {
		h = sha256.New()
	}
	buf := make([]byte, chunk)
	err := extents(src, func(off, n int64) error {
		b := buf[:n]
		if _, err := src.ReadAt(b, off); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		return writeRuns(dst, b, off, h)
	})
	if err != nil || h == nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// CopySparse copies the bytes of a sparse file that are not zero to one of the same
// size in which all are, and returns their digest.
func CopySparse(dst, src *os.File) (digest string, err error) { return copySparse(dst, src, true) }

// Digest is the digest that CopySparse returns, of a file as it is.
func Digest(f *os.File) (string, error) { return digestOf(f) }

// writeRuns writes the pages of b that are not zero and adds them to a digest;
// dst may be nil, and so may h.
func writeRuns(dst *os.File, b []byte, off int64, h hash.Hash) error {
	for begin := 0; begin < len(b); {
		if isZero(b[begin:min(begin+page, len(b))]) {
			begin += page
			continue
		}
		end := begin
		for end < len(b) && !isZero(b[end:min(end+page, len(b))]) {
			if h != nil {
				_ = binary.Write(h, binary.LittleEndian, off+int64(end)) // of each page: runs may be cut anywhere
				h.Write(b[end:min(end+page, len(b))])
			}
			end += page
		}
		end = min(end, len(b))
		if dst != nil {
			if _, err := dst.WriteAt(b[begin:end], off+int64(begin)); err != nil {
				return err
			}
		}
		begin = end
	}
	return nil
}

var zeros [page]byte

func isZero(b []byte) bool { return string(b) == string(zeros[:len(b)]) }

// digestOf is the digest that copySparse returns, of a file as it is.
func digestOf(f *os.File) (string, error) {
	h := sha256.New()
	buf := make([]byte, chunk)
	err := extents(f, func(off, n int64) error {
		if _, err := f.ReadAt(buf[:n], off); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		return writeRuns(nil, buf[:n], off, h)
	})
	return hex.EncodeToString(h.Sum(nil)), err
}

// Memory is a template's memory as its clones have it.
type Memory struct {
	// File is sealed; a VMM may map it privately.
	File  *os.File
	entry string // in live/
}

// Close lets go of the memory.
func (m *Memory) Close() error {
	err := os.Remove(m.entry)
	if errors.Is(err, os.ErrNotExist) {
		err = nil // the template was removed meanwhile
	}
	return errors.Join(err, m.File.Close())
}

// loadTimeout bounds the wait for another process that loads the memory: with a
// whole gibibyte stored that is one second's work.
const loadTimeout = 5 * time.Second

// Shared returns the memory that all live clones share, loading it if there is
// none. The caller closes it after its machine has ended. When another process
// holds the template's lock until ctx ends or for five seconds, that is ErrBusy.
func (t *Template) Shared(ctx context.Context) (*Memory, error) {
	ctx, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	unlock, err := t.s.waitLock(ctx, t.Digest)
	if err != nil {
		return nil, fmt.Errorf("template memory: %w", err)
	}
	defer unlock()
	live := filepath.Join(t.dir, "live")
	f, err := t.findLive(live)
	if err == nil && f == nil {
		f, err = t.load()
		if err == nil {
			_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, sealed)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("template memory: %w", err)
	}
	m := &Memory{File: f, entry: filepath.Join(live, fmt.Sprintf("%d-%d", os.Getpid(), f.Fd()))}
	if err := writeEntry(m.entry, f); err != nil {
		f.Close()
		return nil, fmt.Errorf("template memory: %w", err)
	}
	return m, nil
}

// Copy is a copy of a template's memory that its machine may change. It is under way
// until Wait returns.
type Copy struct {
	File *os.File
	done chan struct{} // closed at the end
	err  error         // set before done is closed
}

// Copy begins to copy the memory. The caller closes it.
func (t *Template) Copy() (*Copy, error) {
	c, err := t.beginCopy()
	if err != nil {
		return nil, fmt.Errorf("template memory: %w", err)
	}
	return c, nil
}

func (t *Template) beginCopy() (*Copy, error) {
	src, err := os.Open(filepath.Join(t.dir, memoryFile))
	if err != nil {
		return nil, err
	}
	f, err := NewMemory(t.Manifest.MemoryBytes)
	if err != nil {
		return nil, errors.Join(err, src.Close())
	}
	c := &Copy{File: f, done: make(chan struct{})}
	go func() {
		defer close(c.done)
		defer src.Close()
		if _, c.err = copySparse(f, src, false); c.err == nil {
			c.err = t.unchanged(src) // meanwhile
		}
	}()
	return c, nil
}

// Wait returns when the memory is there.
func (c *Copy) Wait(ctx context.Context) error {
	select {
	case <-c.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	if c.err != nil {
		return fmt.Errorf("template memory: %w", c.err)
	}
	return nil
}

// Close waits for the end of the copy and lets go of the file.
func (c *Copy) Close() error {
	<-c.done
	return c.File.Close()
}

// load is a whole copy.
func (t *Template) load() (*os.File, error) {
	c, err := t.beginCopy()
	if err != nil {
		return nil, err
	}
	if <-c.done; c.err != nil {
		return nil, errors.Join(c.err, c.File.Close())
	}
	return c.File, nil
}

func inode(f *os.File) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d:%d %d", st.Dev, st.Ino, st.Size), nil
}

func writeEntry(path string, f *os.File) error {
	id, err := inode(f)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(id), 0o600)
}

// findLive opens the memory that another process has loaded, nil when none has.
// Entries of processes that have gone are removed. An entry is only believed
// when it leads to the very file that it was written for.
func (t *Template) findLive(dir string) (*os.File, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		want, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			continue // its owner removed it just now
		}
		if f := openLive(e.Name(), string(want)); f != nil {
			return f, nil
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	return nil, nil
}

func openLive(name, want string) *os.File {
	pid, fd, _ := strings.Cut(name, "-")
	for _, n := range []string{pid, fd} {
		if _, err := strconv.ParseUint(n, 10, 31); err != nil {
			return nil
		}
	}
	f, err := os.OpenFile("/proc/"+pid+"/fd/"+fd, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	id, err := inode(f)
	seals, serr := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil || serr != nil || id != want || seals != sealed {
		f.Close()
		return nil
	}
	return f
}

// users are the processes that hold the memory now.
func users(dir string) []int {
	entries, _ := os.ReadDir(filepath.Join(dir, "live"))
	var out []int
	for _, e := range entries {
		want, err := os.ReadFile(filepath.Join(dir, "live", e.Name()))
		if err != nil {
			continue
		}
		if f := openLive(e.Name(), string(want)); f != nil {
			f.Close()
			pid, _, _ := strings.Cut(e.Name(), "-")
			n, _ := strconv.Atoi(pid)
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
