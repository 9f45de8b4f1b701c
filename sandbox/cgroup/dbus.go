// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/godbus/dbus/v5"
)

// Where systemd is reached: through the message bus, or directly, as root may and
// as systemctl does, on a host without one.
const (
	busSocket     = "/run/dbus/system_bus_socket"
	privateSocket = "/run/systemd/private"
)

// Names of systemd on the bus (org.freedesktop.systemd1(5)).
const (
	systemdName    = "org.freedesktop.systemd1"
	systemdPath    = "/org/freedesktop/systemd1"
	systemdManager = systemdName + ".Manager"
	errUnitExists  = systemdName + ".UnitExists"
	errNoSuchUnit  = systemdName + ".NoSuchUnit"
)

// systemdConn is a connection for one or two calls. It ends with its context.
type systemdConn struct {
	conn    *dbus.Conn
	manager dbus.BusObject
	jobs    chan *dbus.Signal
}

func dialSystemd(ctx context.Context) (Systemd, error) {
	return dialAt(ctx, busSocket, privateSocket)
}

// dialAt connects to the bus, or else directly, and asks to be told of finished jobs.
func dialAt(ctx context.Context, bus, private string) (Systemd, error) {
	s, err := connect(ctx, bus, true)
	if err == nil {
		return s, nil
	}
	s, err2 := connect(ctx, private, false)
	if err2 != nil {
		return nil, fmt.Errorf("systemd does not answer on this host: %w", errors.Join(err, err2))
	}
	return s, nil
}

func connect(ctx context.Context, socket string, bus bool) (s *systemdConn, err error) {
	conn, err := dbus.Dial("unix:path="+dbus.EscapeBusAddressValue(socket), dbus.WithContext(ctx))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", socket, err)
	}
	defer func() {
		if err != nil {
			conn.Close()
			s, err = nil, fmt.Errorf("%s: %w", socket, err)
		}
	}()
	if err := conn.Auth(nil); err != nil {
		return nil, err
	}
	s = &systemdConn{conn: conn, manager: conn.Object(systemdName, systemdPath), jobs: make(chan *dbus.Signal, 16)}
	conn.Signal(s.jobs)
	if !bus { // no daemon between: every signal comes by itself
		return s, nil
	}
	if err := conn.Hello(); err != nil {
		return nil, err
	}
	err = conn.AddMatchSignalContext(ctx, dbus.WithMatchInterface(systemdManager), dbus.WithMatchMember("JobRemoved"))
	if err != nil {
		return nil, err
	}
	return s, s.manager.CallWithContext(ctx, systemdManager+".Subscribe", 0).Err
}

// Close implements Systemd.
func (s *systemdConn) Close() error { return s.conn.Close() }

// property is one of a transient unit; auxiliary a unit that is made with it, which is never used.
type (
	property struct {
		Name  string
		Value dbus.Variant
	}
	auxiliary struct {
		Name       string
		Properties []property
	}
)

// StartScope implements Systemd.
func (s *systemdConn) StartScope(ctx context.Context, sc Scope) error {
	props, err := sc.properties()
	if err != nil {
		return err
	}
	if err := s.job(ctx, "StartTransientUnit", sc.Name, "fail", props, []auxiliary(nil)); err != nil {
		if isError(err, errUnitExists) {
			err = fmt.Errorf("%w: %w", errInUse, err)
		}
		return fmt.Errorf("start unit %s: %w", sc.Name, err)
	}
	return nil
}

// SetLimits implements Systemd. They hold as long as the unit does (the argument
// "runtime"), which is transient itself.
func (s *systemdConn) SetLimits(ctx context.Context, sc Scope) error {
	props, err := sc.limits(true)
	if err == nil {
		err = s.manager.CallWithContext(ctx, systemdManager+".SetUnitProperties", 0, sc.Name, true, props).Err
	}
	if err != nil {
		return fmt.Errorf("set limits of unit %s: %w", sc.Name, err)
	}
	return nil
}

// StopUnit implements Systemd.
func (s *systemdConn) StopUnit(ctx context.Context, name string) error {
	if err := s.job(ctx, "StopUnit", name, "replace"); err != nil && !isError(err, errNoSuchUnit) {
		return fmt.Errorf("stop unit %s: %w", name, err)
	}
	return nil
}

func isError(err error, name string) bool {
	var e dbus.Error
	return errors.As(err, &e) && e.Name == name
}

// job calls a method that answers with a job, and waits for its end:
// JobRemoved(id, job, unit, result), which may come before the answer.
func (s *systemdConn) job(ctx context.Context, method string, args ...any) error {
	var job dbus.ObjectPath
	if err := s.manager.CallWithContext(ctx, systemdManager+"."+method, 0, args...).Store(&job); err != nil {
		var e dbus.Error // which shows only its text
		if errors.As(err, &e) {
			err = fmt.Errorf("%s: %w", e.Name, err)
		}
		return err
	}
	for {
		select {
		case sig, ok := <-s.jobs:
			if !ok {
				return errors.Join(dbus.ErrClosed, context.Cause(ctx))
			}
			if sig.Name != systemdManager+".JobRemoved" || len(sig.Body) != 4 || sig.Body[1] != job {
				continue
			}
			if sig.Body[3] != "done" {
				return fmt.Errorf("systemd's job ended as %q", sig.Body[3])
			}
			return nil
		case <-ctx.Done():
			return fmt.Errorf("systemd's job %s has not ended: %w", job, ctx.Err())
		}
	}
}

// properties are those of the scope on the wire (org.freedesktop.systemd1(5), systemd.resource-control(5)).
func (sc Scope) properties() ([]property, error) {
	var out []property
	add := func(name string, v any) { out = append(out, property{name, dbus.MakeVariant(v)}) }
	add("Description", sc.Description)
	add("Slice", sc.Slice)
	add("PIDs", []uint32{uint32(sc.PID)})
	// The cgroup's files are written here too.
	add("Delegate", true)
	add("DefaultDependencies", false)
	// Nothing of it stays when the processes are gone, however they went.
	add("CollectMode", "inactive-or-failed")
	for _, what := range []string{"CPU", "Memory", "Tasks", "IO"} {
		add(what+"Accounting", true)
	}
	limits, err := sc.limits(false)
	return append(out, limits...), err
}

// limits are the properties of the unit's limits; with all also of those that are
// none, which systemd has the greatest number or an empty list for.
func (sc Scope) limits(all bool) (out []property, err error) {
	add := func(name string, v any) { out = append(out, property{name, dbus.MakeVariant(v)}) }
	number := func(name string, n int64, unit uint64) {
		if n > 0 {
			add(name, uint64(n)*unit)
		} else if all {
			add(name, uint64(math.MaxUint64))
		}
	}
	number("MemoryMax", sc.Limits.MemoryBytes, 1)
	number("CPUQuotaPerSecUSec", sc.Limits.CPUQuota, 1_000_000/period)
	if !sc.V2 { // systemd has no cpuset of version 1
		return out, nil
	}
	for _, p := range []struct{ name, list, field string }{
		{"AllowedCPUs", sc.Limits.CPUs, "linux.resources.cpu.cpus"}, {"AllowedMemoryNodes", sc.Limits.Mems, "linux.resources.cpu.mems"},
	} {
		if p.list == "" && !all {
			continue
		}
		if p.list == "" {
			add(p.name, []byte{})
			continue
		}
		set, err := parseList(p.list)
		if err != nil {
			return nil, fmt.Errorf("%s is %q: %w", p.field, p.list, err)
		}
		add(p.name, set)
	}
	return out, nil
}
