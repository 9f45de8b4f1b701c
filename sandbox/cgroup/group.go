// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/sandbox/ledger"
)

// Options are what Open needs beside the plan.
type Options struct {
	// PID is the process to place, with all its threads; 0 is this one.
	PID int
	// Ledger holds what must be removed when this process is killed.
	Ledger *ledger.Ledger
	// Log gets one line per event.
	Log *slog.Logger
	// Dial connects to systemd for a plan with a unit; nil uses its usual sockets.
	Dial func(context.Context) (Systemd, error)
}

// Group is the cgroup of a running pod.
type Group struct {
	plan    Plan
	limits  Limits // the plan's, without those that hold already
	o       Options
	homes   map[string]string // by mount point, where the process was before
	entries []entry           // in the order of their making
	started bool              // the unit is, or may be
	io      map[IODevice]IORate
}

// entry is a directory that was made, or may have been.
type entry struct {
	path   string
	parent bool
	token  ledger.Token
}

// Open makes the pod's cgroup and moves the process there, so that its children are
// born inside. When it fails, nothing has changed.
func (h Host) Open(ctx context.Context, p Plan, o Options) (*Group, error) {
	if o.PID == 0 {
		o.PID = os.Getpid()
	}
	if o.Dial == nil {
		o.Dial = dialSystemd
	}
	homes, err := h.homes(o.PID)
	if err != nil {
		return nil, err
	}
	g := &Group{plan: p, limits: p.Limits, o: o, homes: homes}
	if len(p.Dirs) == 0 {
		o.Log.Warn("this host has no cgroups: the pod is not limited", "path", p.Path)
		return g, nil
	}
	if err := g.open(ctx); err != nil {
		err = fmt.Errorf("cgroup %s: %w", p.Path, err)
		if errors.Is(err, errInUse) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrAlreadyExists)
		}
		return nil, errors.Join(err, g.Close(context.WithoutCancel(ctx)))
	}
	o.Log.Info("cgroup joined", "path", p.Path, "unit", p.Unit, "memory", g.limits.MemoryBytes, "cpu_quota", g.limits.CPUQuota, "cpus", g.limits.CPUs)
	return g, nil
}

func (g *Group) open(ctx context.Context) error {
	for _, d := range g.plan.Dirs {
		g.limits = g.limits.notAbove(d)
	}
	if g.plan.Unit != "" {
		if err := g.startUnit(ctx); err != nil {
			return err
		}
	}
	var missing []string
	for _, d := range g.owned() {
		if err := g.prepare(d, &missing); err != nil {
			return err
		}
	}
	if len(missing) > 0 {
		g.o.Log.Warn("cgroup controllers are missing: their limits do not hold on the host", "controllers", strings.Join(missing, " "))
	}
	for _, d := range g.plan.Dirs {
		if err := g.limit(d); err != nil {
			return err
		}
	}
	for _, d := range g.processDirs() {
		if err := writeFile(strconv.Itoa(g.o.PID), d.Path, "cgroup.procs"); err != nil {
			return fmt.Errorf("move process %d: %w", g.o.PID, err)
		}
	}
	return nil
}

// owned are the directories that this package makes if nobody else has.
func (g *Group) owned() []Dir { return slices.Concat(g.plan.Overhead, g.plan.Dirs) }

// processDirs are those that whole processes are in.
func (g *Group) processDirs() []Dir {
	if g.Split() {
		return g.plan.Overhead
	}
	return g.plan.Dirs
}

func (g *Group) prepare(d Dir, missing *[]string) error {
	if _, err := os.Stat(d.Path); g.started && err == nil {
		// systemd made it, and put the process there; it is recorded already.
	} else if err := g.makeDir(d); err != nil {
		return err
	}
	if d.V2 {
		*missing = append(*missing, d.enable()...)
	}
	if !d.V2 && d.has("cpuset") {
		return d.inheritCPUs()
	}
	return nil
}

// limit writes the limits that are for this directory's controllers.
func (g *Group) limit(d Dir) error {
	for _, s := range g.limits.settings(d.V2) {
		if !d.has(s.controller) {
			continue
		}
		if err := g.set(d, s); err != nil {
			return err
		}
	}
	return nil
}

func (g *Group) set(d Dir, s setting) error {
	err := writeFile(s.value, d.Path, s.file)
	if errors.Is(err, fs.ErrNotExist) && d.V2 {
		return nil // the controller is missing, which was said
	}
	if err != nil {
		return fmt.Errorf("%s is %q: %w: %w", s.field, s.value, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Limits are those of the cgroup now. Nobody calls Update meanwhile.
func (g *Group) Limits() Limits { return g.limits }

// Split tells whether only threads belong into the pod's cgroup; see AddThreads.
func (g *Group) Split() bool { return len(g.plan.Overhead) > 0 }

// AddThreads moves threads of a process that is in the overhead's cgroup into the
// pod's. Without Split they are there already.
func (g *Group) AddThreads(tids []int) error {
	if !g.Split() {
		return nil
	}
	for _, d := range g.plan.Dirs {
		for _, tid := range tids {
			if err := writeFile(strconv.Itoa(tid), d.Path, "tasks"); err != nil {
				return fmt.Errorf("cgroup %s: move thread %d: %w", g.plan.Path, tid, err)
			}
		}
	}
	return nil
}

// closeTime bounds a Close whose caller set no deadline.
const closeTime = 5 * time.Second

// Close moves the process, and what else is left in the cgroup, back to where the
// process came from, and removes what Open made. What cannot be removed stays in
// the ledger. Calling it again is harmless.
func (g *Group) Close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, closeTime)
	defer cancel()
	var errs []error
	for _, e := range g.entries {
		if !e.parent {
			errs = append(errs, g.leave(e.path))
		}
	}
	if g.started {
		errs = append(errs, g.stopUnit(ctx))
		g.started = false
	}
	errs = append(errs, g.remove(false, func(p string) error { return ledger.RemoveCgroup(ctx, p) }))
	errs = append(errs, g.remove(true, ledger.RemoveCgroupParent))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("leave cgroup %s: %w", g.plan.Path, err)
	}
	return nil
}

// remove removes the pod's own directories, or then the parents, the deepest first.
func (g *Group) remove(parents bool, rm func(string) error) error {
	var errs []error
	for _, e := range slices.Backward(slices.Clone(g.entries)) {
		if e.parent != parents {
			continue
		}
		err := rm(e.path)
		if err == nil {
			err = g.forget(e.path)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// leave empties a directory. Only what was started last, a container's logger for
// example, can be there beside the process itself.
func (g *Group) leave(dir string) error {
	pids, err := members(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if pid == 0 {
			continue // of another pid namespace: not ours to move
		}
		if err := g.sendHome(dir, pid); err != nil {
			return err
		}
	}
	return nil
}

// SendHome moves a process, which was born in the cgroup, to where this one came
// from: it does not count against the pod, nor end with it.
func (g *Group) SendHome(pid int) error {
	for mount, home := range g.homes {
		if err := g.sendTo(mount, home, pid); err != nil {
			return fmt.Errorf("move process %d to %s: %w", pid, home, err)
		}
	}
	return nil
}

// sendHome moves a process out of dir, to the root of the hierarchy if the process's former place is gone.
func (g *Group) sendHome(dir string, pid int) error {
	for mount, home := range g.homes {
		if !strings.HasPrefix(dir, mount+"/") {
			continue
		}
		if err := g.sendTo(mount, home, pid); err != nil {
			return fmt.Errorf("move process %d out of %s: %w", pid, dir, err)
		}
	}
	return nil
}

// sendTo moves a process to home, or to the root of the hierarchy; one that is gone is no error.
func (g *Group) sendTo(mount, home string, pid int) error {
	err := writeFile(strconv.Itoa(pid), home, "cgroup.procs")
	if err != nil && !errors.Is(err, unix.ESRCH) {
		err = writeFile(strconv.Itoa(pid), mount, "cgroup.procs")
	}
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

// record writes a directory into the ledger, once.
func (g *Group) record(path string, parent bool) error {
	if slices.ContainsFunc(g.entries, func(e entry) bool { return e.path == path }) {
		return nil
	}
	what := ledger.Cgroup(path)
	if parent {
		what = ledger.CgroupParent(path)
	}
	token, err := g.o.Ledger.Record(what)
	if err == nil {
		g.entries = append(g.entries, entry{path, parent, token})
	}
	return err
}

func (g *Group) forget(path string) error {
	i := slices.IndexFunc(g.entries, func(e entry) bool { return e.path == path })
	if i < 0 {
		return nil
	}
	err := g.o.Ledger.Forget(g.entries[i].token)
	if err == nil {
		g.entries = slices.Delete(g.entries, i, i+1)
	}
	return err
}
