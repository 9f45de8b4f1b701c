// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParseCmdline(t *testing.T) {
	d := DefaultParams()
	for _, c := range []struct {
		line string
		want func(p *Params)
		bad  int
	}{
		{"console=ttyS0 quiet panic=1", func(*Params) {}, 0},
		{"agent.log=debug agent.log_vport=1025", func(p *Params) { p.LogLevel, p.LogPort = slog.LevelDebug, 1025 }, 0},
		{"agent.ready_port=4026531840", func(p *Params) { p.ReadyPort = 4026531840 }, 0},
		{"agent.debug_console agent.debug_console_vport=1026", func(p *Params) { p.DebugConsole, p.DebugConsolePort = true, 1026 }, 0},
		{"agent.debug_console=false", func(*Params) {}, 0},
		{"agent.server_addr=vsock://3:2000", func(p *Params) { p.ServerCID, p.ServerPort = 3, 2000 }, 0},
		{"agent.server_addr=vsock://-1:1024", func(*Params) {}, 0},
		{"agent.server_addr=unix:///x", func(*Params) {}, 1},
		{"agent.server_addr=vsock://x:1", func(*Params) {}, 1},
		{"agent.passfd_listener_port=0", func(p *Params) { p.StdioPort = 0 }, 0},
		{"agent.passfd_listener_port=1027", func(p *Params) { p.StreamsAsked = true }, 0},
		{"agent.hotplug_timeout=10 agent.launch_process_timeout=7", func(p *Params) {
			p.HotplugTimeout, p.LaunchTimeout = 10*time.Second, 7*time.Second
		}, 0},
		{"agent.container_pipe_size=1048576", func(p *Params) { p.PipeSize = 1 << 20 }, 0},
		{"agent.container_pipe_size=-1", func(*Params) {}, 1},
		{"agent.log=loud agent.log_vport=x agent.hotplug_timeout=3s", func(*Params) {}, 3},
		{"agent.unknown=1 agent.trace=true agent.devmode", func(p *Params) { p.DevMode = true }, 0},
		{"agent.log=error agent.log=warn", func(p *Params) { p.LogLevel = slog.LevelWarn }, 0},
	} {
		want := d
		c.want(&want)
		got, bad := ParseCmdline(c.line)
		if got != want {
			t.Errorf("%q:\n got %+v\nwant %+v", c.line, got, want)
		}
		if len(bad) != c.bad {
			t.Errorf("%q: complaints %q, want %d", c.line, bad, c.bad)
		}
	}
}

func TestBadValueNamesParameter(t *testing.T) {
	_, bad := ParseCmdline("agent.ready_port=99999999999")
	if len(bad) != 1 || !strings.Contains(bad[0], "agent.ready_port=99999999999") || !strings.Contains(bad[0], "vsock port") {
		t.Errorf("complaint %q", bad)
	}
}

func modDir(t *testing.T, order string, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if order != "" {
		if err := os.WriteFile(filepath.Join(dir, "order"), []byte(order), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestModuleGroups(t *testing.T) {
	dir := modDir(t, "boot a.ko\nboot b.ko  x=1 y=2\n\nfs c.ko\n# note\n", nil)
	var loaded []string
	m, err := openModules(dir, func(path, params string) error {
		loaded = append(loaded, strings.TrimSpace(filepath.Base(path)+" "+params))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range []string{"boot", "boot", "none", "fs"} {
		if err := m.Ensure(g); err != nil {
			t.Fatal(err)
		}
	}
	if want := []string{"a.ko", "b.ko x=1 y=2", "c.ko"}; !slices.Equal(loaded, want) {
		t.Errorf("loaded %q, want %q", loaded, want)
	}
}

func TestModuleFailureIsRemembered(t *testing.T) {
	dir := modDir(t, "net a.ko\n", nil)
	boom := errors.New("boom")
	m, err := openModules(dir, func(string, string) error { return boom })
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := m.Ensure("net"); !errors.Is(err, boom) || !strings.Contains(err.Error(), "a.ko") {
			t.Errorf("got %v", err)
		}
	}
}

func TestModuleOrderMissingOrBad(t *testing.T) {
	m, err := OpenModules(t.TempDir())
	if err != nil || m.Ensure("boot") != nil {
		t.Errorf("no order file: %v", err)
	}
	for _, bad := range []string{"boot\n", "boot ../x.ko\n"} {
		if _, err := OpenModules(modDir(t, bad, nil)); err == nil || !strings.Contains(err.Error(), "line 1") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestModuleByName(t *testing.T) {
	dir := modDir(t, "extra kata-test-a.ko\nextra kata_test_b.ko\nextra loop.ko\n", map[string]string{
		"kata-test-a.ko": "ELF\x00license=GPL\x00depends=kata_test_b\x00",
		"kata_test_b.ko": "ELF\x00depends=\x00",
	})
	var loaded []string
	m, err := openModules(dir, func(path, params string) error {
		loaded = append(loaded, filepath.Base(path)+" "+params)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.LoadByName("kata_test_a", []string{"p=1", "q=2"}); err != nil {
		t.Fatal(err)
	}
	if want := []string{"kata_test_b.ko ", "kata-test-a.ko p=1 q=2"}; !slices.Equal(loaded, want) {
		t.Errorf("loaded %q, want %q", loaded, want)
	}
	if err := m.LoadByName("kata_no_such", nil); err == nil || !strings.Contains(err.Error(), "guest image") {
		t.Errorf("unknown module: %v", err)
	}
}

func TestModuleCycleEnds(t *testing.T) {
	dir := modDir(t, "extra kata_cyc.ko\n", map[string]string{"kata_cyc.ko": "\x00depends=kata_cyc\x00"})
	m, err := openModules(dir, func(string, string) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	if err := m.LoadByName("kata_cyc", nil); err == nil {
		t.Error("a cycle was accepted")
	}
}

// A request of the kernel names a module or an alias, and options.
func TestDemandedModules(t *testing.T) {
	dir := modDir(t, "extra base_x.ko\nextra xt_far.ko\n", map[string]string{
		"base_x.ko": "\x00depends=\x00", "xt_far.ko": "\x00depends=base_x\x00", "alias": "ipt_far xt_far.ko\nip6t-far xt_far.ko\n",
	})
	for _, args := range [][]string{{"-q", "--", "ipt_far"}, {"ip6t_far", "-q"}, {"xt-far"}} {
		var loaded []string
		m, err := openModules(dir, func(path, _ string) error {
			loaded = append(loaded, filepath.Base(path))
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := m.demanded(args); err != nil || strings.Join(loaded, " ") != "base_x.ko xt_far.ko" {
			t.Errorf("%q loads %q, %v", args, loaded, err)
		}
		if err := m.demanded([]string{"-q", "--", "net-pf-99"}); err == nil || !strings.Contains(err.Error(), "net_pf_99") {
			t.Errorf("got %v; want the name that the image does not have", err)
		}
	}
}
