// SPDX-License-Identifier: Apache-2.0

package rpc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/boot"
	"github.com/kata-v2/kata/guest-agent/devices"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// machine is a sysfs of CPUs; the first one cannot be taken down.
type machine struct {
	*testing.T
	*Service
	sys string
}

func newMachine(t *testing.T, cpus int) *machine {
	m := &machine{T: t, sys: t.TempDir()}
	modules, err := boot.OpenModules(m.sys)
	if err != nil {
		t.Fatal(err)
	}
	m.Service = &Service{Finder: &devices.Finder{Sys: m.sys, Timeout: 10 * time.Millisecond}, Modules: modules}
	for i := range cpus {
		dir := filepath.Join(m.sys, fmt.Sprintf("devices/system/cpu/cpu%d", i))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			m.write(fmt.Sprintf("cpu/cpu%d/online", i), "0\n")
		}
	}
	return m
}

func (m *machine) write(file, text string) {
	m.Helper()
	path := filepath.Join(m.sys, "devices/system", file)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		m.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		m.Fatal(err)
	}
}

// up is the state of each CPU, '1' for up.
func (m *machine) up() (s string) {
	m.Helper()
	cpus, err := cpusIn(m.sys)
	if err != nil {
		m.Fatal(err)
	}
	for _, c := range cpus {
		if c.up() {
			s += "1"
		} else {
			s += "0"
		}
	}
	return s
}

func TestOnlineCPUs(t *testing.T) {
	m := newMachine(t, 12) // so that cpu10 must not come before cpu2
	m.write("memory/memory7/state", "offline\n")
	var before []string
	m.OneCPU = func() error { before = append(before, m.up()); return nil }
	for _, c := range []struct {
		req  *agentpb.OnlineCPUMemRequest
		want string
		ok   bool
	}{
		{&agentpb.OnlineCPUMemRequest{NbCpus: 2, CpuOnly: true}, "111000000000", true},
		{&agentpb.OnlineCPUMemRequest{OnlineCpus: 11, Wait: true}, "111111111110", true},
		{&agentpb.OnlineCPUMemRequest{OnlineCpus: 2, CpuOnly: true}, "110000000000", true},
		{&agentpb.OnlineCPUMemRequest{NbCpus: 1, Wait: true, CpuOnly: true}, "111000000000", true},
		{&agentpb.OnlineCPUMemRequest{CpuOnly: true}, "111111111111", true},
		{&agentpb.OnlineCPUMemRequest{NbCpus: 1, Wait: true, CpuOnly: true}, "111111111111", false},
		{&agentpb.OnlineCPUMemRequest{OnlineCpus: 13, Wait: true, CpuOnly: true}, "111111111111", false},
		{&agentpb.OnlineCPUMemRequest{NbCpus: 1, CpuOnly: true}, "111111111111", true},
	} {
		_, err := m.OnlineCPUMem(context.Background(), c.req)
		if got := m.up(); got != c.want || (err == nil) != c.ok {
			t.Errorf("%v: CPUs %s, %v; want %s, success %t", c.req, got, err, c.want, c.ok)
		}
	}
	if want := []string{"100000000000", "111000000000", "110000000000", "111000000000"}; !slices.Equal(before, want) {
		t.Errorf("what is done before CPUs come up found %v, want %v", before, want)
	}
	if !reads(filepath.Join(m.sys, "devices/system/memory/memory7/state"), "online") {
		t.Error("memory stayed offline")
	}
}

// A block that somebody else brings up at the same moment is up; one that does not
// come up is an error.
func TestBringUp(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	for now, want := range map[string]error{"online": nil, "offline": unix.EINVAL} {
		if err := os.WriteFile(state, []byte("offline\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		err := bringUp(state, func(path string, _ []byte, mode os.FileMode) error {
			return errors.Join(unix.EINVAL, os.WriteFile(path, []byte(now), mode))
		})
		if !errors.Is(err, want) {
			t.Errorf("a block that is %s after an EINVAL: %v, want %v", now, err, want)
		}
	}
}
