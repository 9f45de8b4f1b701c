// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/godbus/dbus/v5"
)

// fakeSystemd answers like systemd on a socket: as the message bus, or directly.
// Scopes are directories of the machine's real cgroups.
type fakeSystemd struct {
	t      *testing.T
	host   Host
	bus    bool
	socket string

	// What it does wrong, set before it is used.
	refuse string // name of the error that answers StartTransientUnit
	result string // of jobs, "done" when empty
	silent bool   // jobs do not end

	mu    sync.Mutex
	units map[string]map[string]dbus.Variant // guarded by mu
	calls []string                           // guarded by mu
}

func newFakeSystemd(t *testing.T, h Host, bus bool) *fakeSystemd {
	t.Helper()
	f := &fakeSystemd{t: t, host: h, bus: bus, socket: filepath.Join(t.TempDir(), "bus"), units: map[string]map[string]dbus.Variant{}}
	l, err := net.Listen("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				if err := f.serve(c); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
					t.Errorf("fake systemd: %v", err)
				}
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return f
}

func (f *fakeSystemd) dial(ctx context.Context) (Systemd, error) {
	if f.bus {
		return dialAt(ctx, f.socket, f.socket+"-no")
	}
	return dialAt(ctx, f.socket+"-no", f.socket)
}

// serve is one connection: the handshake of the D-Bus specification ("Authentication
// Protocol"), then messages.
func (f *fakeSystemd) serve(c net.Conn) error {
	r := bufio.NewReader(c)
	if b, err := r.ReadByte(); err != nil || b != 0 {
		return fmt.Errorf("first byte %d: %w", b, err)
	}
	for begun := false; !begun; {
		line, err := r.ReadString('\n')
		if err != nil {
			return err
		}
		switch word := strings.Fields(line); {
		case word[0] == "BEGIN":
			begun = true
		case word[0] == "AUTH" && len(word) > 1 && word[1] == "EXTERNAL":
			fmt.Fprintf(c, "OK %032x\r\n", 1)
		case word[0] == "AUTH":
			io.WriteString(c, "REJECTED EXTERNAL\r\n")
		default:
			io.WriteString(c, "ERROR\r\n")
		}
	}
	s := &session{f: f, c: c}
	for {
		m, err := dbus.DecodeMessage(r)
		if err != nil {
			return err
		}
		if err := s.handle(m); err != nil {
			return err
		}
	}
}

// session is one client.
type session struct {
	f                          *fakeSystemd
	c                          net.Conn
	serial                     uint32
	hello, matched, subscribed bool
}

func (s *session) send(m *dbus.Message) error {
	s.serial++
	// The serial is not settable from outside: encoded by hand it would be a second
	// implementation, so it is patched into the fixed header (bytes 8 to 11).
	var b strings.Builder
	if err := encode(&b, m); err != nil {
		return err
	}
	raw := []byte(b.String())
	binary.LittleEndian.PutUint32(raw[8:], s.serial)
	_, err := s.c.Write(raw)
	return err
}

func (s *session) reply(to *dbus.Message, name string, body ...any) error {
	m := &dbus.Message{Type: dbus.TypeMethodReply, Headers: map[dbus.HeaderField]dbus.Variant{dbus.FieldReplySerial: dbus.MakeVariant(to.Serial())}, Body: body}
	if name != "" {
		m.Type = dbus.TypeError
		m.Headers[dbus.FieldErrorName] = dbus.MakeVariant(name)
	}
	return s.send(m)
}

func encode(w io.Writer, m *dbus.Message) error {
	if len(m.Body) > 0 {
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(m.Body...))
	}
	return m.EncodeTo(w, binary.LittleEndian)
}

func (s *session) removed(job dbus.ObjectPath, unit, result string) error {
	if s.f.bus && (!s.matched || !s.subscribed) {
		return nil // nobody asked
	}
	return s.send(&dbus.Message{Type: dbus.TypeSignal, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldPath:      dbus.MakeVariant(dbus.ObjectPath(systemdPath)),
		dbus.FieldInterface: dbus.MakeVariant(systemdManager),
		dbus.FieldMember:    dbus.MakeVariant("JobRemoved"),
	}, Body: []any{uint32(7), job, unit, result}})
}

func (s *session) handle(m *dbus.Message) error {
	member, _ := m.Headers[dbus.FieldMember].Value().(string)
	s.f.mu.Lock()
	s.f.calls = append(s.f.calls, member)
	s.f.mu.Unlock()
	if s.f.bus && !s.hello && member != "Hello" {
		return fmt.Errorf("%s before Hello", member)
	}
	switch member {
	case "Hello":
		s.hello = true
		return s.reply(m, "", ":1.1")
	case "AddMatch":
		rule, _ := m.Body[0].(string)
		s.matched = strings.Contains(rule, "JobRemoved")
		return s.reply(m, "")
	case "Subscribe":
		s.subscribed = true
		return s.reply(m, "")
	case "StartTransientUnit":
		return s.start(m)
	case "SetUnitProperties":
		return s.setProperties(m)
	case "StopUnit":
		return s.stop(m)
	}
	return s.reply(m, "org.freedesktop.DBus.Error.UnknownMethod", member)
}

// finish answers with a job whose end is told before the answer, after that of another.
func (s *session) finish(m *dbus.Message, unit string) error {
	const job = dbus.ObjectPath("/org/freedesktop/systemd1/job/7")
	if s.f.silent {
		return s.reply(m, "", job)
	}
	result := s.f.result
	if result == "" {
		result = "done"
	}
	return errors.Join(s.removed(job+"1", "other.scope", "failed"), s.removed(job, unit, result), s.reply(m, "", job))
}

func (s *session) start(m *dbus.Message) error {
	if sig := m.Headers[dbus.FieldSignature].String(); sig != `@g "ssa(sv)a(sa(sv))"` {
		return fmt.Errorf("StartTransientUnit has the signature %s", sig)
	}
	name := m.Body[0].(string)
	props := map[string]dbus.Variant{}
	for _, p := range m.Body[2].([][]any) {
		props[p[0].(string)] = p[1].(dbus.Variant)
	}
	if s.f.refuse != "" {
		return s.reply(m, s.f.refuse, "no")
	}
	s.f.mu.Lock()
	_, exists := s.f.units[name]
	if !exists {
		s.f.units[name] = props
	}
	s.f.mu.Unlock()
	switch {
	case exists:
		return s.reply(m, errUnitExists, "Unit "+name+" already exists.")
	case m.Body[1] != "fail":
		return fmt.Errorf("mode %v", m.Body[1])
	}
	for _, d := range s.f.dirs(props["Slice"].Value().(string), name) {
		if err := os.MkdirAll(d.Path, 0o755); err != nil {
			return err
		}
		if !d.V2 && d.has("cpuset") {
			if err := d.inheritCPUs(); err != nil {
				return err
			}
		}
		for _, pid := range props["PIDs"].Value().([]uint32) {
			if err := writeFile(strconv.Itoa(int(pid)), d.Path, "cgroup.procs"); err != nil {
				return err
			}
		}
	}
	return s.finish(m, name)
}

// dirs are those that systemd makes: its own, and controllers that are accounted.
func (f *fakeSystemd) dirs(slice, unit string) []Dir {
	p, err := expandSlice(slice)
	if err != nil {
		f.t.Error(err)
	}
	if f.host.V2 != nil {
		return dirs([]Hierarchy{*f.host.V2}, filepath.Join(p, unit))
	}
	hs := slices.Clone(f.host.Tracking)
	if m, ok := f.host.with("memory"); ok {
		hs = append(hs, m)
	}
	return dirs(hs, filepath.Join(p, unit))
}

func (s *session) setProperties(m *dbus.Message) error {
	if sig := m.Headers[dbus.FieldSignature].String(); sig != `@g "sba(sv)"` {
		return fmt.Errorf("SetUnitProperties has the signature %s", sig)
	}
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	unit, ok := s.f.units[m.Body[0].(string)]
	if !ok || m.Body[1] != true {
		return s.reply(m, errNoSuchUnit, "Unit not loaded, or not at run time.")
	}
	for _, p := range m.Body[2].([][]any) {
		unit[p[0].(string)] = p[1].(dbus.Variant)
	}
	return s.reply(m, "")
}

func (s *session) stop(m *dbus.Message) error {
	name := m.Body[0].(string)
	s.f.mu.Lock()
	props, ok := s.f.units[name]
	delete(s.f.units, name)
	s.f.mu.Unlock()
	if !ok {
		return s.reply(m, errNoSuchUnit, "Unit "+name+" not loaded.")
	}
	for _, d := range s.f.dirs(props["Slice"].Value().(string), name) {
		if pids, _ := members(d.Path); len(pids) > 0 {
			return fmt.Errorf("unit %s is stopped with %v in %s: systemd would kill them", name, pids, d.Path)
		}
		if err := os.Remove(d.Path); err != nil {
			return err
		}
	}
	return s.finish(m, name)
}

// newSystemdFixture is a fixture whose pods are scopes in a slice of the test's own.
func newSystemdFixture(t *testing.T, h Host, bus bool) (*fixture, *fakeSystemd) {
	s := newFakeSystemd(t, h, bus)
	f := newFixture(t, h)
	f.dial = s.dial
	slice := fmt.Sprintf("katatest%dx%x.slice", os.Getpid(), time.Now().UnixNano()&0xffffff)
	f.parent, f.path = "/"+slice, slice+":cri-containerd:abc"
	for _, m := range h.all() { // as systemd and kubelet have made it
		f.must(os.Mkdir(filepath.Join(m.Mount, slice), 0o755))
	}
	t.Cleanup(func() { // runs before the fixture looks for what is left
		for _, m := range h.all() {
			if err := os.Remove(filepath.Join(m.Mount, slice)); err != nil {
				t.Errorf("the slice, which is systemd's: %v", err)
			}
		}
	})
	return f, s
}

func TestSystemd(t *testing.T) {
	for name, h := range hosts(t) {
		for _, bus := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/bus=%v", name, bus), func(t *testing.T) {
				conformance(t, func(t *testing.T) *fixture {
					f, _ := newSystemdFixture(t, h, bus)
					return f
				})
			})
		}
	}
}

// What systemd is told, and what it does wrong.
func TestSystemdUnit(t *testing.T) {
	for name, h := range hosts(t) {
		t.Run(name, func(t *testing.T) {
			f, s := newSystemdFixture(t, h, true)
			r := f.request()
			r.Resources, r.Overhead = limited(64<<20, 50_000, "0-1"), limited(32<<20, 12_500, "")
			g, err := f.open(r)
			f.must(err)
			s.mu.Lock()
			got := s.units["cri-containerd-abc.scope"]
			s.mu.Unlock()
			want := map[string]any{
				"Slice": f.parent[1:], "Delegate": true, "DefaultDependencies": false, "CollectMode": "inactive-or-failed",
				"MemoryAccounting": true, "CPUAccounting": true, "TasksAccounting": true, "IOAccounting": true,
				"MemoryMax": uint64(96 << 20), "CPUQuotaPerSecUSec": uint64(1_250_000),
			}
			if h.V2 != nil {
				want["AllowedCPUs"] = []byte{3}
			}
			for k, v := range want {
				if fmt.Sprint(got[k].Value()) != fmt.Sprint(v) {
					t.Errorf("%s is %v, want %v", k, got[k], v)
				}
			}
			if pids, _ := got["PIDs"].Value().([]uint32); len(pids) != 1 || int(pids[0]) != f.child.Process.Pid {
				t.Errorf("PIDs %v", got["PIDs"])
			}
			if len(got) != len(want)+2 { // Description and PIDs
				t.Errorf("properties %v", got)
			}
			f.must(g.Update(f.Context(), limited(128<<20, 0, ""), r.Overhead, false))
			s.mu.Lock()
			got = s.units["cri-containerd-abc.scope"]
			s.mu.Unlock()
			if m, q := got["MemoryMax"].Value(), got["CPUQuotaPerSecUSec"].Value(); m != uint64(160<<20) || q != uint64(math.MaxUint64) {
				t.Errorf("after an update MemoryMax is %v, CPUQuotaPerSecUSec %v", m, q)
			}
			f.must(g.Close(f.Context()))
			s.mu.Lock()
			if len(s.units) != 0 {
				t.Errorf("units left: %v", s.units)
			}
			s.mu.Unlock()

			before := f.where(f.child.Process.Pid)
			for _, c := range []struct {
				name string
				set  func()
				word string
				is   func(error) bool
			}{
				{"job fails", func() { s.result = "failed" }, `"failed"`, nil},
				{"unit of another", func() { s.result, s.refuse = "", errUnitExists }, "in use", errdefs.IsAlreadyExists},
				{"refused", func() { s.refuse = "org.freedesktop.DBus.Error.AccessDenied" }, "AccessDenied", nil},
			} {
				c.set()
				_, err := f.open(f.request())
				if err == nil || !strings.Contains(err.Error(), c.word) || c.is != nil && !c.is(err) {
					t.Errorf("%s: %v", c.name, err)
				}
				if f.where(f.child.Process.Pid) != before {
					t.Errorf("%s: the process is not where it was", c.name)
				}
			}
		})
	}
}

// A host without systemd says so, and a systemd that hangs does not hang the pod.
func TestSystemdAbsent(t *testing.T) {
	for name, h := range hosts(t) {
		t.Run(name, func(t *testing.T) {
			f, s := newSystemdFixture(t, h, false)
			f.dial = func(ctx context.Context) (Systemd, error) { return dialAt(ctx, s.socket+"-a", s.socket+"-b") }
			if _, err := f.open(f.request()); err == nil || !strings.Contains(err.Error(), "linux.cgroupsPath") || !strings.Contains(err.Error(), s.socket+"-b") {
				t.Errorf("without systemd: %v", err)
			}
			s.silent = true
			c, err := s.dial(t.Context())
			f.must(err)
			defer c.Close()
			ctx, cancel := context.WithCancelCause(t.Context())
			done := make(chan error, 1)
			go func() {
				done <- c.StartScope(ctx, Scope{Name: "hang.scope", Slice: f.parent[1:], PID: f.child.Process.Pid})
			}()
			cancel(nil)
			select {
			case err := <-done:
				if !errors.Is(err, context.Canceled) {
					t.Errorf("a call that was given up: %v", err)
				}
			case <-time.After(5 * time.Second):
				t.Fatal("the call does not end")
			}
			for _, d := range s.dirs(f.parent[1:], "hang.scope") {
				os.Remove(d.Path)
			}
		})
	}
}

func TestUnion(t *testing.T) {
	t.Parallel()
	for _, c := range [][3]string{{"0", "1", "0,1"}, {"1", "0,1", "0,1"}, {"0-2", "9", "0,1,2,9"}, {"x", "1", "x,1"}} {
		if got := union(c[0], c[1]); got != c[2] {
			t.Errorf("%s and %s are %s; want %s", c[0], c[1], got, c[2])
		}
	}
}

func TestParseList(t *testing.T) {
	t.Parallel()
	for list, want := range map[string][]byte{"0": {1}, "0-3": {15}, "7": {128}, "1,8-9": {2, 3}, " 0 , 2": {5}} {
		if got, err := parseList(list); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %v, %v; want %v", list, got, err, want)
		}
	}
	for _, list := range []string{"", "a", "3-1", "-1", "1-", "0,,1", "9999", "0-70000", "1.5"} {
		if _, err := parseList(list); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", list, err)
		}
	}
}
