// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// reapTimeout bounds a Reap whose caller set no deadline. A process that has not
// gone this long after SIGKILL hangs in the kernel.
const reapTimeout = 10 * time.Second

// Left is an entry that could not be undone.
type Left struct {
	Entry Entry
	Err   error
}

// Report says what a Reap did.
type Report struct {
	Key  string
	Meta Meta
	// Removed are the entries that were undone, those that were gone already included.
	Removed []Entry
	// Left are those that were not; the ledger stays for another Reap then.
	Left []Left
}

// Err joins the reasons of Left, nil when there are none.
func (r Report) Err() error {
	var errs []error
	for _, l := range r.Left {
		errs = append(errs, fmt.Errorf("%s: %w", l.Entry, l.Err))
	}
	return errors.Join(errs...)
}

// Reap removes everything that a dead sandbox left behind, then its directory. It
// refuses with ErrAlive while the shim lives and with ErrBusy while another
// process reaps. It goes on after a failure: the error joins all of them, and a
// later Reap takes up what the report has in Left. A sandbox without a directory
// is an empty report and no error. One that is written in a newer format is left
// untouched: ErrNewer.
func Reap(ctx context.Context, root, key string) (Report, error) {
	r := Report{Key: key}
	if err := checkKey(key); err != nil {
		return r, err
	}
	dir := filepath.Join(root, key)
	lock, err := lockDead(dir)
	if err != nil {
		return r, fmt.Errorf("ledger: reap %s: %w", dir, err)
	}
	if lock == nil {
		return r, nil
	}
	defer lock.Close()
	c, err := read(dir)
	if err != nil {
		return r, fmt.Errorf("%w; %s was left as it is", err, dir)
	}
	r.Meta = c.meta
	if c.version > Version {
		return r, fmt.Errorf("ledger: reap %s: %w (format %d by build %q, this one knows formats up to %d): it was left as it is; reap it with that build",
			dir, ErrNewer, c.version, c.meta.Build, Version)
	}
	if _, limited := ctx.Deadline(); !limited {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, reapTimeout)
		defer cancel()
	}
	if err := reapEntries(ctx, dir, c, &r); err != nil {
		return r, fmt.Errorf("ledger: reap %s: %w", dir, err)
	}
	if err := r.Err(); err != nil {
		return r, fmt.Errorf("ledger: reap %s: left: %w", dir, err)
	}
	return r, removeSandboxDir(dir)
}

// reapEntries undoes the live entries: first whatever runs, so that it makes
// nothing new, then the rest; each in the reverse order of its recording.
func reapEntries(ctx context.Context, dir string, c content, r *Report) error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	rebooted := c.meta.Boot != "" && c.meta.Boot != boot
	// Not O_CREATE: without a ledger there are no entries to strike out.
	f, err := os.OpenFile(filepath.Join(dir, ledgerFile), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return ignoreMissing(err)
	}
	defer f.Close()
	if err := f.Truncate(c.complete); err != nil {
		return err
	}
	for _, running := range []bool{true, false} {
		for _, n := range slices.Backward(c.live) {
			if (n.Kind == KindProcess || n.Kind == KindCgroup) != running {
				continue
			}
			if !rebooted || n.onDisk() {
				if err := undo(ctx, n.Entry); err != nil {
					r.Left = append(r.Left, Left{Entry: n.Entry, Err: err})
					continue
				}
			}
			r.Removed = append(r.Removed, n.Entry)
			if err := strike(f, n.N); err != nil {
				return err
			}
		}
	}
	return nil
}

// onDisk tells which kinds survive a reboot; the other ones would name something else by then.
func (e Entry) onDisk() bool {
	switch e.Kind {
	case KindFile, KindSocket, KindDir:
		return true
	case KindProcess, KindLink, KindIngress, KindFilter, KindQdisc, KindCgroup, KindCgroupParent, KindMount, KindNetNS, KindLoop:
		return false
	}
	return true // unknown: undo reports it
}

func strike(f *os.File, n uint64) error {
	b, err := json.Marshal(line{Del: n})
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	return err
}

// Info describes a sandbox found by List.
type Info struct {
	Key  string
	Meta Meta
	// Alive says that the shim holds the lock.
	Alive bool
	// Version of the format; higher than Version when a newer build wrote it.
	Version int
	// Entries are the live entries in the order of their recording.
	Entries []Numbered
	// Err says that the ledger could not be read; only Key and Alive hold then.
	Err error
}

// List describes every sandbox below root, in the order of their keys. A root
// that does not exist has none. It takes no lock and disturbs nobody.
func List(root string) ([]Info, error) {
	names, err := sandboxDirs(root)
	if err != nil {
		return nil, err
	}
	var out []Info
	for _, name := range names {
		if strings.HasPrefix(name, ".") {
			continue
		}
		i, err := inspect(root, name)
		if errors.Is(err, os.ErrNotExist) {
			continue // it ended meanwhile, or is not a sandbox's directory
		}
		i.Err = err
		out = append(out, i)
	}
	return out, nil
}

func sandboxDirs(root string) ([]string, error) {
	list, err := os.ReadDir(root)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("ledger: state directory: %w", err)
	}
	var out []string
	for _, e := range list {
		if e.IsDir() {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

func inspect(root, key string) (Info, error) {
	dir := filepath.Join(root, key)
	i := Info{Key: key}
	f, err := os.Open(filepath.Join(dir, lockFile))
	if err != nil {
		return i, err
	}
	defer f.Close()
	if i.Alive, err = byteLocked(f, aliveByte); err != nil {
		return i, err
	}
	c, err := read(dir)
	i.Meta, i.Version, i.Entries = c.meta, c.version, c.live
	return i, err
}

// GC reaps every dead sandbox below root and the unfinished directories of killed
// Creates. Live ones and those that another process reaps are passed over. The
// error joins what went wrong; the reports are of all that were dead.
func GC(ctx context.Context, root string) ([]Report, error) {
	names, err := sandboxDirs(root)
	if err != nil {
		return nil, err
	}
	var reports []Report
	var errs []error
	for _, name := range names {
		if strings.HasPrefix(name, newPrefix) {
			errs = append(errs, dropUnfinished(filepath.Join(root, name)))
			continue
		}
		if !isSandboxDir(filepath.Join(root, name)) {
			continue
		}
		r, err := Reap(ctx, root, name)
		if errors.Is(err, ErrAlive) || errors.Is(err, ErrBusy) {
			continue
		}
		reports = append(reports, r)
		errs = append(errs, err)
	}
	return reports, errors.Join(errs...)
}

// isSandboxDir keeps GC away from directories that somebody else put below root:
// a sandbox's has a lock, or nothing (a reaper killed at its last step).
func isSandboxDir(dir string) bool {
	if _, err := os.Lstat(filepath.Join(dir, lockFile)); err == nil {
		return true
	}
	list, err := os.ReadDir(dir)
	return err == nil && len(list) == 0 && len(filepath.Base(dir)) == 16
}

// dropUnfinished removes what a killed Create left, once its maker is gone.
func dropUnfinished(dir string) error {
	parts := strings.SplitN(strings.TrimPrefix(filepath.Base(dir), newPrefix), "-", 3)
	if len(parts) != 3 {
		return nil
	}
	pid, err1 := strconv.Atoi(parts[0])
	start, err2 := strconv.ParseUint(parts[1], 10, 64)
	if err1 != nil || err2 != nil {
		return nil
	}
	now, err := StartTime(pid)
	if err == nil && now == start {
		return nil // still at work
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := removeTree(dir); err != nil {
		return fmt.Errorf("ledger: unfinished sandbox: %w", err)
	}
	return nil
}
