// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/kata-v2/kata/internal/config"
)

func TestKataConfigIsRead(t *testing.T) {
	c, err := Start(t.Context(), Options{Kata: &Kata{Images: "/images", Set: map[string]string{
		"hypervisor.qemu.kernel": `"/else/vmlinux"`, "hypervisor.qemu.manifest": "", "agent.kata.dial_timeout": "7",
	}}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Stop(t.Context()); err == nil || !strings.Contains(err.Error(), "pods/abc was left") {
			t.Errorf("Stop: %v; want the left pod named", err)
		}
	}()
	got, _, err := config.Load(config.LoadOptions{Path: c.ConfigFile()})
	if err != nil {
		t.Fatal(err)
	}
	if q := got.QEMU; q.Kernel != "/else/vmlinux" || q.Initrd != "/images/kata-initrd.img" || q.Manifest != "" || q.Accelerator != "auto" || got.Runtime.StateDir != c.PodsDir() || got.Agent.DialTimeout != 7*time.Second {
		t.Errorf("read back: %+v", got)
	}
	if err := os.MkdirAll(filepath.Join(c.PodsDir(), "abc"), 0o700); err != nil {
		t.Fatal(err)
	}
}

func TestPhases(t *testing.T) {
	line := `time="…" level=info msg="container started" sandbox=x t_config=812µs t_boot="1.5s" t_create=20.5 id=t_no`
	got, err := Phases(line)
	want := []Phase{{"t_config", 812 * time.Microsecond}, {"t_boot", 1500 * time.Millisecond}, {"t_create", 20500 * time.Microsecond}}
	if err != nil || !reflect.DeepEqual(got, want) || !Started(line) {
		t.Errorf("got %v, %v; want %v", got, err, want)
	}
	for _, bad := range []string{`msg="container started" t_boot=soon`, `msg="container started"`} {
		if _, err := Phases(bad); err == nil {
			t.Errorf("%s was accepted", bad)
		}
	}
}
