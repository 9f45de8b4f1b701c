// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// Systemd manages units.
type Systemd interface {
	// StartScope makes a transient scope around a process and returns when it is
	// active. The error is errInUse for a name that a unit has already.
	StartScope(ctx context.Context, s Scope) error
	// SetLimits changes the limits that systemd knows of the unit s.Name; those that
	// are not set become none.
	SetLimits(ctx context.Context, s Scope) error
	// StopUnit ends a unit; one that does not exist is no error.
	StopUnit(ctx context.Context, name string) error
	// Close closes the connection.
	Close() error
}

// Scope is a transient unit (systemd.scope(5)).
type Scope struct {
	// Name ends in .scope, Slice in .slice.
	Name, Slice, Description string
	// PID is the process around which it is made.
	PID int
	// Limits that systemd is to know, since it writes its own values again at times;
	// V2 tells the version of the host's cgroups.
	Limits Limits
	V2     bool
}

// startUnit makes the scope. Its directories are in the ledger before; whoever reaps
// them needs no systemd, which forgets an empty scope by itself.
func (g *Group) startUnit(ctx context.Context) error {
	for _, d := range append(g.plan.Dirs[:len(g.plan.Dirs):len(g.plan.Dirs)], g.plan.Tracking...) {
		if err := unused(d.Path); errors.Is(err, errInUse) {
			return err
		}
		if err := g.record(d.Path, false); err != nil {
			return err
		}
	}
	conn, err := g.o.Dial(ctx)
	if err != nil {
		return fmt.Errorf("linux.cgroupsPath names a unit of systemd: %w", err)
	}
	defer conn.Close()
	err = conn.StartScope(ctx, Scope{
		Name: g.plan.Unit, Slice: g.plan.Slice, PID: g.o.PID, Limits: g.limits, V2: g.plan.Dirs[0].V2,
		Description: "Kata pod " + g.plan.Unit,
	})
	if errors.Is(err, errInUse) { // then its directories are not ours to remove
		for _, e := range slices.Clone(g.entries) {
			err = errors.Join(err, g.forget(e.path))
		}
		return err
	}
	g.started = true
	return err
}

func (g *Group) stopUnit(ctx context.Context) error {
	conn, err := g.o.Dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	return conn.StopUnit(ctx, g.plan.Unit)
}
