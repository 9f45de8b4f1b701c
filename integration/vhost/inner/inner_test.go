// SPDX-License-Identifier: Apache-2.0

package inner

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// stepTimeout bounds what boots a guest or talks to one: emulation in emulation.
const stepTimeout = 15 * time.Minute

func TestMain(m *testing.M) {
	if os.Getenv(Env) == "" {
		fmt.Println("vhost: these tests run in the machine that `make test-vhost` boots, and nowhere else")
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// TestVhost goes from the kernel's interface up to containers.
func TestVhost(t *testing.T) {
	for _, stage := range []struct {
		name string
		f    func(*testing.T)
	}{
		{"Host", host},
		{"ContextIDs", contextIDs},
		{"ForeignPeer", foreignPeer},
		{"VhostNet", vhostNet},
		{"Device", device},
		{"Hypervisor", conformance},
		{"Pods", pods},
	} {
		t.Run(stage.name, func(t *testing.T) {
			begin := time.Now()
			defer func() { t.Logf("%s took %v", stage.name, time.Since(begin).Round(100*time.Millisecond)) }()
			stage.f(t)
		})
	}
}

// host says what this machine is, and fails where it is not what the tests are about.
func host(t *testing.T) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	t.Logf("kernel %s", unix.ByteSliceToString(u.Release[:]))
	for _, dev := range []string{"/dev/vhost-vsock", "/dev/vhost-net", "/dev/vsock", "/dev/net/tun", "/dev/mapper/control"} {
		f, err := os.OpenFile(dev, os.O_RDWR, 0)
		if err != nil {
			t.Error(err)
			continue
		}
		f.Close()
		t.Logf("%s opens", dev)
	}
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
		t.Errorf("/sys/fs/cgroup: type %#x, %v; want the unified hierarchy of cgroup v2", st.Type, err)
	}
	controllers, err := os.ReadFile("/sys/fs/cgroup/cgroup.subtree_control")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("cgroup v2 with %s", bytes.TrimSpace(controllers))
}

// process is a running program and its arguments.
type process struct {
	pid  int
	args []string
}

// processes lists the running programs whose file name begins with name.
func processes(t *testing.T, name string) (out []process) {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range paths {
		data, _ := os.ReadFile(p) // empty when it has ended
		args := strings.Split(strings.TrimRight(string(data), "\x00"), "\x00")
		if !strings.HasPrefix(filepath.Base(args[0]), name) {
			continue
		}
		var pid int
		if _, err := fmt.Sscanf(p, "/proc/%d/", &pid); err != nil {
			t.Fatal(err)
		}
		out = append(out, process{pid, args})
	}
	return out
}

// has tells whether some argument contains part.
func (p process) has(part string) bool { return strings.Contains(strings.Join(p.args, "\x00"), part) }
