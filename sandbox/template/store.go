// SPDX-License-Identifier: Apache-2.0

package template

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Files of a template.
const (
	manifestFile = "manifest.json"
	memoryFile   = "memory"
	stateFile    = "state"
	newPrefix    = ".new-"
	lockSuffix   = ".lock"
)

// formatVersion changes when an older template cannot be read any more.
const formatVersion = 2

// Store is a directory of templates, shared by all shims of the host.
type Store struct {
	// Dir is made when it is needed.
	Dir string
}

// Manifest says what a template is.
type Manifest struct {
	Version int       `json:"version"`
	Digest  string    `json:"digest"`
	Created time.Time `json:"created"`
	Key     Key       `json:"key"`
	// MemoryBytes is the guest's memory, MemoryStored what the file holds of it.
	MemoryBytes  int64  `json:"memory_bytes"`
	MemoryStored int64  `json:"memory_stored"`
	MemorySHA256 string `json:"memory_sha256"` // of its pages that are not zero, each after its place
	MemoryFile   string `json:"memory_file"`   // which file it is, and as of when: see version
	StateBytes   int64  `json:"state_bytes"`
	StateSHA256  string `json:"state_sha256"`
}

// Template is one that is whole, as far as can be told without reading its memory.
type Template struct {
	Manifest
	s   *Store
	dir string
}

// Open finds a template. An error that is errdefs.ErrNotFound says that there is
// none; any other says what is wrong with it.
func (s *Store) Open(digest string) (*Template, error) {
	t := &Template{s: s, dir: filepath.Join(s.Dir, digest)}
	b, err := os.ReadFile(filepath.Join(t.dir, manifestFile))
	if errors.Is(err, os.ErrNotExist) {
		if _, serr := os.Stat(t.dir); serr != nil {
			return nil, fmt.Errorf("template %s: %w", digest, errdefs.ErrNotFound)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("template %s: %w", digest, err)
	}
	if err := json.Unmarshal(b, &t.Manifest); err != nil {
		return nil, fmt.Errorf("template %s: %s: %w", digest, manifestFile, err)
	}
	if err := t.check(digest); err != nil {
		return nil, fmt.Errorf("template %s: %w", digest, err)
	}
	return t, nil
}

// check is what can be told quickly.
func (t *Template) check(digest string) error {
	if t.Version != formatVersion {
		return fmt.Errorf("version %d: this build reads %d", t.Version, formatVersion)
	}
	if t.Manifest.Digest != digest || t.Key.Digest() != digest {
		return fmt.Errorf("its manifest is that of %s", t.Manifest.Digest)
	}
	memory, err := os.Open(filepath.Join(t.dir, memoryFile))
	if err != nil {
		return err
	}
	defer memory.Close()
	if err := t.unchanged(memory); err != nil {
		return err
	}
	sum, n, err := sumFile(filepath.Join(t.dir, stateFile))
	if err != nil {
		return err
	}
	if n != t.StateBytes || sum != t.StateSHA256 {
		return fmt.Errorf("%s is not what was saved", stateFile)
	}
	return nil
}

// unchanged tells whether a template's memory file is the one that was saved, and
// has not been written since. Reading all of it would take longer than a clone does.
func (t *Template) unchanged(memory *os.File) error {
	now, size, err := version(memory)
	switch {
	case err != nil:
		return err
	case size != t.MemoryBytes:
		return fmt.Errorf("%s has %d bytes, not %d", memoryFile, size, t.MemoryBytes)
	case now != t.MemoryFile:
		return fmt.Errorf("%s was changed after it was saved: it is %s, not %s", memoryFile, now, t.MemoryFile)
	}
	return nil
}

// version says which file it is, and when it was last changed: every write and
// every change of size is another time (inode(7), ctime).
func version(f *os.File) (v string, size int64, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return "", 0, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return fmt.Sprintf("inode %d, changed %d.%09d", st.Ino, st.Ctim.Sec, st.Ctim.Nsec), st.Size, nil
}

// Verify reads the memory too.
func (t *Template) Verify() error {
	f, err := os.Open(filepath.Join(t.dir, memoryFile))
	if err != nil {
		return err
	}
	defer f.Close()
	sum, err := digestOf(f)
	if err != nil {
		return err
	}
	if sum != t.MemorySHA256 {
		return fmt.Errorf("template %s: %s is not what was saved", t.Digest, memoryFile)
	}
	return nil
}

// State opens the devices' state.
func (t *Template) State() (*os.File, error) { return os.Open(filepath.Join(t.dir, stateFile)) }

// Stale tells whether no machine can be started from it any more, because a file
// that it was made of has changed.
func (t *Template) Stale() bool { return t.Key.Stale() }

// Users are the processes whose machines share the template's memory now.
func (t *Template) Users() []int { return users(t.dir) }

func sumFile(path string) (string, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil)), n, err
}

// ErrBusy says that somebody else makes the template, or loads its memory.
var ErrBusy = fmt.Errorf("another process makes or loads the template: %w", errdefs.ErrUnavailable)

// waitLock is lock with a wait that ends with ctx, which is ErrBusy then.
func (s *Store) waitLock(ctx context.Context, digest string) (unlock func(), err error) {
	type got struct {
		unlock func()
		err    error
	}
	// flock(2) cannot be called off: a wait that nobody is interested in any
	// more lasts until the holder ends, or this process does.
	locked := make(chan got)
	go func() {
		unlock, err := s.lock(digest, true)
		select {
		case locked <- got{unlock, err}:
		case <-ctx.Done():
			if err == nil {
				unlock()
			}
		}
	}()
	select {
	case g := <-locked:
		return g.unlock, g.err
	case <-ctx.Done():
		return nil, fmt.Errorf("%w (%w)", ErrBusy, ctx.Err())
	}
}

// lock takes a template's lock: when it is held, it waits or answers ErrBusy.
func (s *Store) lock(digest string, wait bool) (unlock func(), err error) {
	path := filepath.Join(s.Dir, digest+lockSuffix)
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		if err := flock(f, wait); err != nil {
			f.Close()
			return nil, err
		}
		// Who held it may have removed it with the template.
		have, err := f.Stat()
		named, nerr := os.Stat(path)
		if err == nil && nerr == nil && os.SameFile(have, named) {
			return func() { f.Close() }, nil
		}
		f.Close()
		if err != nil {
			return nil, err
		}
	}
}

func flock(f *os.File, wait bool) error {
	how := unix.LOCK_EX
	if !wait {
		how |= unix.LOCK_NB
	}
	for {
		err := unix.Flock(int(f.Fd()), how)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EWOULDBLOCK):
			return ErrBusy
		default:
			return os.NewSyscallError("flock", err)
		}
	}
}

// Make makes the template of a key with save, which boots a machine on memory,
// an anonymous file, and saves it to state. A template that is there and whole
// is left alone. On error nothing is left.
func (s *Store) Make(ctx context.Context, k Key, memoryBytes int64, save func(ctx context.Context, dir string, memory, state *os.File) error) (err error) {
	digest := k.Digest()
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return fmt.Errorf("template: %w", err)
	}
	unlock, err := s.lock(digest, false)
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := s.Open(digest); err == nil {
		return nil
	}
	dir := filepath.Join(s.Dir, newPrefix+digest)
	if err := os.RemoveAll(dir); err != nil { // of a maker that was killed
		return fmt.Errorf("template: %w", err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("make template %s: %w", digest, errors.Join(err, os.RemoveAll(dir)))
		}
	}()
	if err := s.makeRoom(digest); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	m := Manifest{Version: formatVersion, Digest: digest, Created: time.Now().UTC(), Key: k, MemoryBytes: memoryBytes}
	if err := m.fill(ctx, dir, save); err != nil {
		return err
	}
	final := filepath.Join(s.Dir, digest)
	if err := os.RemoveAll(final); err != nil { // one that is broken
		return err
	}
	return os.Rename(dir, final)
}

// fill writes the files of a new template.
func (m *Manifest) fill(ctx context.Context, dir string, save func(ctx context.Context, dir string, memory, state *os.File) error) error {
	memory, err := NewMemory(m.MemoryBytes)
	if err != nil {
		return err
	}
	defer memory.Close()
	state, err := os.OpenFile(filepath.Join(dir, stateFile), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return err
	}
	defer state.Close()
	if err := save(ctx, dir, memory, state); err != nil {
		return err
	}
	if m.StateSHA256, m.StateBytes, err = sumFile(state.Name()); err != nil {
		return err
	}
	stored, err := os.OpenFile(filepath.Join(dir, memoryFile), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return err
	}
	defer stored.Close()
	if err := stored.Truncate(m.MemoryBytes); err != nil {
		return err
	}
	if m.MemorySHA256, err = copySparse(stored, memory, true); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(stored.Fd()), &st); err != nil {
		return err
	}
	m.MemoryStored = st.Blocks * 512
	if m.MemoryFile, _, err = version(stored); err != nil {
		return err
	}
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, manifestFile), append(b, '\n'), 0o400)
}

// maxTemplates is how many there are at a time, so that what pods ask for in
// annotations does not fill the memory of the host.
const maxTemplates = 6

// makeRoom removes the templates that no machine can start from any more, and the
// oldest when there are too many. Those that machines run from stay.
func (s *Store) makeRoom(but string) error {
	digests, err := s.List()
	if err != nil {
		return err
	}
	var idle []*Template
	for _, d := range digests {
		t, err := s.Open(d)
		switch {
		case d == but || errdefs.IsNotFound(err):
		case err != nil || t.Stale() && len(t.Users()) == 0:
			if err := s.remove(d); err != nil && !errors.Is(err, ErrBusy) {
				return err
			}
		case len(t.Users()) == 0:
			idle = append(idle, t)
		}
	}
	slices.SortFunc(idle, func(a, b *Template) int { return a.Created.Compare(b.Created) })
	for _, t := range idle[:max(0, len(idle)-maxTemplates+1)] {
		if err := s.remove(t.Digest); err != nil && !errors.Is(err, ErrBusy) {
			return err
		}
	}
	return nil
}

// List returns the digests of all templates, whole or not.
func (s *Store) List() ([]string, error) {
	entries, err := os.ReadDir(s.Dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("templates: %w", err)
	}
	var out []string
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

// Clear removes the templates for which which is true, and what killed makers
// left of any. It returns the digests of those that are gone; one that is being
// made stays, which is ErrBusy.
func (s *Store) Clear(which func(digest string) bool) (removed []string, err error) {
	digests, err := s.List()
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, d := range digests {
		if !which(d) {
			continue
		}
		if err := s.remove(d); err != nil {
			errs = append(errs, err)
			continue
		}
		removed = append(removed, d)
	}
	unfinished, err := filepath.Glob(filepath.Join(s.Dir, newPrefix+"*"))
	errs = append(errs, err)
	for _, dir := range unfinished {
		d := strings.TrimPrefix(filepath.Base(dir), newPrefix)
		if _, err := s.Open(d); errdefs.IsNotFound(err) {
			errs = append(errs, s.remove(d))
		}
	}
	return removed, errors.Join(errs...)
}

// remove removes a template and what a killed maker left of it. Machines that
// run from it go on. One that is being made is ErrBusy.
func (s *Store) remove(digest string) error {
	unlock, err := s.lock(digest, false)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove template %s: %w", digest, err)
	}
	defer unlock()
	return errors.Join(
		os.RemoveAll(filepath.Join(s.Dir, digest)),
		os.RemoveAll(filepath.Join(s.Dir, newPrefix+digest)),
		os.Remove(filepath.Join(s.Dir, digest+lockSuffix)),
	)
}
