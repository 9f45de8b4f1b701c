// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kata-v2/kata/internal/version"
	"golang.org/x/sys/unix"
)

// Errors that callers tell apart with errors.Is.
var (
	// ErrAlive: the sandbox's shim lives, so its ledger cannot be reaped.
	ErrAlive = errors.New("the sandbox is alive")
	// ErrBusy: another process is reaping this ledger right now.
	ErrBusy = errors.New("the sandbox is being reaped by another process")
	// ErrExists: there is a ledger already, of a live sandbox or one to reap first.
	ErrExists = errors.New("the sandbox has a ledger already")
	// ErrNewer: a newer build wrote the ledger in a format that this one does not know.
	ErrNewer = errors.New("a newer build wrote this ledger")
	// ErrNotEmpty: Close found entries that were not forgotten.
	ErrNotEmpty = errors.New("the ledger still has entries")
)

// Token names a recorded entry for Forget.
type Token uint64

// Ledger is the ledger of a live sandbox, held by this process. Its methods may
// be called at the same time.
type Ledger struct {
	dir  string
	lock *os.File
	file *os.File

	// mu guards what follows; it is not held while writing to file.
	mu   sync.Mutex
	last uint64
	live map[Token]Entry
	// torn says that a write failed half way, so that the next one starts on a new line.
	torn bool
}

// Key derives a sandbox's key from its bundle directory: the first 16
// hexadecimal digits of the SHA-256 of the clean absolute path.
func Key(bundleDir string) string {
	if abs, err := filepath.Abs(bundleDir); err == nil {
		bundleDir = abs
	}
	sum := sha256.Sum256([]byte(filepath.Clean(bundleDir)))
	return hex.EncodeToString(sum[:8])
}

// checkKey keeps keys inside the root and apart from the names that this package makes up.
func checkKey(key string) error {
	if key == "" || len(key) > 64 || strings.HasPrefix(key, ".") || strings.ContainsAny(key, "/\x00") {
		return fmt.Errorf("ledger: %q is not a sandbox key; see Key", key)
	}
	return nil
}

// newPrefix begins the name of a directory that Create has not finished; its
// maker's pid and start time follow.
const newPrefix = ".new-"

// Create makes the directory root/key with its lock held and its header written.
// It appears complete or not at all. ErrExists means that it was there: of a live
// sandbox, or of a dead one that must be reaped first.
func Create(root, key string, m Meta) (*Ledger, error) {
	if err := checkKey(key); err != nil {
		return nil, err
	}
	if err := fill(&m); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, fmt.Errorf("ledger: state directory: %w", err)
	}
	tmp := filepath.Join(root, fmt.Sprintf("%s%d-%d-%s", newPrefix, m.Shim.PID, m.Shim.Start, rand.Text()[:8]))
	l := &Ledger{dir: tmp, live: map[Token]Entry{}}
	if err := l.make(m); err != nil {
		return nil, errors.Join(fmt.Errorf("ledger: create: %w", err), l.discard())
	}
	final := filepath.Join(root, key)
	// rename replaces an empty directory (one whose reaper is at its last step)
	// and refuses any other.
	if err := os.Rename(tmp, final); err != nil {
		if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
			err = fmt.Errorf("%s: %w", final, ErrExists)
		}
		return nil, errors.Join(fmt.Errorf("ledger: create: %w", err), l.discard())
	}
	l.dir = final
	return l, nil
}

func fill(m *Meta) (err error) {
	pid := os.Getpid()
	start, err := StartTime(pid)
	if err != nil {
		return err
	}
	m.Shim = Proc{PID: pid, Start: start}
	if m.Created.IsZero() {
		m.Created = time.Now().UTC()
	}
	if m.Build == "" {
		m.Build = version.Version
	}
	m.Boot, err = bootID()
	return err
}

func (l *Ledger) make(m Meta) (err error) {
	if err := os.Mkdir(l.dir, 0o700); err != nil {
		return err
	}
	if l.lock, err = openLock(l.dir); err != nil {
		return err
	}
	if err := lockByte(l.lock, aliveByte); err != nil {
		return err
	}
	if l.file, err = os.OpenFile(filepath.Join(l.dir, ledgerFile), os.O_WRONLY|os.O_APPEND|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return err
	}
	return l.write(header{Ledger: Version, Meta: m})
}

// discard removes a directory that Create could not finish.
func (l *Ledger) discard() error {
	l.closeFiles()
	if err := os.RemoveAll(l.dir); err != nil {
		return fmt.Errorf("ledger: %w", err)
	}
	return nil
}

func (l *Ledger) closeFiles() {
	for _, f := range []*os.File{l.file, l.lock} {
		if f != nil {
			f.Close()
		}
	}
}

// Adopt continues a ledger in the process that inherited its lock file: the
// daemon that the start command leaves behind. The ledger owns lock afterwards.
func Adopt(root, key string, lock *os.File) (*Ledger, error) {
	if err := checkKey(key); err != nil {
		return nil, err
	}
	dir := filepath.Join(root, key)
	if err := sameFile(lock, filepath.Join(dir, lockFile)); err != nil {
		return nil, fmt.Errorf("ledger: adopt: the inherited lock is not that of %s: %w", dir, err)
	}
	// It is ours already when start passed it on; this fails when it is not.
	if err := lockByte(lock, aliveByte); err != nil {
		return nil, fmt.Errorf("ledger: adopt %s: %w", dir, err)
	}
	c, err := read(dir)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, ledgerFile), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return nil, fmt.Errorf("ledger: adopt: %w", err)
	}
	// An inherited descriptor is not close-on-exec: a child that kept it would keep
	// the sandbox "alive" after the shim's death.
	unix.CloseOnExec(int(lock.Fd()))
	l := &Ledger{dir: dir, lock: lock, file: f, last: c.last, live: map[Token]Entry{}}
	for _, n := range c.live {
		l.live[Token(n.N)] = n.Entry
	}
	if err := l.takeOver(c.complete); err != nil {
		f.Close()
		return nil, err
	}
	return l, nil
}

func (l *Ledger) takeOver(complete int64) error {
	if err := l.file.Truncate(complete); err != nil { // a torn last line
		return fmt.Errorf("ledger: adopt: %w", err)
	}
	pid := os.Getpid()
	start, err := StartTime(pid)
	if err != nil {
		return err
	}
	if err := l.write(line{Owner: &Proc{PID: pid, Start: start}}); err != nil {
		return fmt.Errorf("ledger: adopt: %w", err)
	}
	return nil
}

// Dir is the sandbox's directory, removed with the ledger.
func (l *Ledger) Dir() string { return l.dir }

// LockFile is the lock, to be passed to the daemon (ExtraFiles) for Adopt.
func (l *Ledger) LockFile() *os.File { return l.lock }

// Record writes down an entry. Only after it has returned without error may the
// thing be acquired.
func (l *Ledger) Record(e Entry) (Token, error) {
	if err := e.check(); err != nil {
		return 0, err
	}
	l.mu.Lock()
	l.last++
	t := Token(l.last)
	l.live[t] = e
	l.mu.Unlock()
	if err := l.write(line{Add: uint64(t), Entry: &e}); err != nil {
		l.mu.Lock()
		delete(l.live, t)
		l.mu.Unlock()
		return 0, fmt.Errorf("ledger: record %s: %w", e, err)
	}
	return t, nil
}

// Forget strikes an entry out, after the thing has been released. A token that
// is not live is no error.
func (l *Ledger) Forget(t Token) error {
	l.mu.Lock()
	e, ok := l.live[t]
	l.mu.Unlock()
	if !ok {
		return nil
	}
	if err := l.write(line{Del: uint64(t)}); err != nil {
		return fmt.Errorf("ledger: forget %s: %w", e, err)
	}
	l.mu.Lock()
	delete(l.live, t)
	l.mu.Unlock()
	return nil
}

// Entries returns the live entries in the order they were recorded.
func (l *Ledger) Entries() []Numbered {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]Numbered, 0, len(l.live))
	for _, t := range slices.Sorted(maps.Keys(l.live)) {
		out = append(out, Numbered{N: uint64(t), Entry: l.live[t]})
	}
	return out
}

// write appends one line with one write(2), so that lines of several writers
// never mix and a kill tears at most the last.
func (l *Ledger) write(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	b = append(b, '\n')
	l.mu.Lock()
	if l.torn {
		b = append([]byte("\n"), b...)
	}
	l.mu.Unlock()
	n, err := l.file.Write(b)
	l.mu.Lock()
	l.torn = err != nil && (n > 0 || l.torn)
	l.mu.Unlock()
	return err
}

// Close removes the sandbox's directory and frees the lock. With live entries
// it fails with ErrNotEmpty: the lock is freed and the directory stays for Reap.
func (l *Ledger) Close() error {
	left := l.Entries()
	if len(left) > 0 {
		l.closeFiles()
		names := make([]string, len(left))
		for i, n := range left {
			names[i] = n.String()
		}
		return fmt.Errorf("ledger: %s: %w: %s", l.dir, ErrNotEmpty, strings.Join(names, ", "))
	}
	err := removeSandboxDir(l.dir)
	l.closeFiles()
	return err
}

// Release closes this process's descriptors and leaves the directory: the start
// command's last step, when the daemon has inherited the lock, or the first step
// towards a Reap.
func (l *Ledger) Release() error {
	return errors.Join(l.file.Close(), l.lock.Close())
}
