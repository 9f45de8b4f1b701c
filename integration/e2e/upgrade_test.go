// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"golang.org/x/sys/unix"
)

// newBuild is what the other shim of this test calls itself.
const newBuild = "99.0.0-upgrade"

// TestShimUpgrade: a package manager replaces the shim below running pods. They
// keep their process; new pods get the new program; what a killed old one leaves,
// the new one's delete reaps, or kata-ctl gc where containerd was not there.
func TestShimUpgrade(t *testing.T) {
	o := labOptions(t)
	former := filepath.Join(o.ShimDir, "containerd-shim-kata-v2")
	o.ShimDir = t.TempDir()
	path := filepath.Join(o.ShimDir, "containerd-shim-kata-v2")
	copyProgram(t, former, path)
	b := newOwnBox(t, o)
	for _, id := range []string{"old", "crashed", "orphan"} {
		b.start(id, nil, "sleep", "1000")
		if got := b.buildOf(id); got == newBuild {
			t.Fatalf("%s runs under build %s already", id, got)
		}
	}
	boot := b.bootID("old")

	next := filepath.Join(o.ShimDir, ".new")
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -X github.com/kata-v2/kata/internal/version.Version="+newBuild,
		"-o", next, "github.com/kata-v2/kata/cmd/containerd-shim-kata-v2")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.Rename(next, path); err != nil {
		t.Fatal(err)
	}
	if got := b.bootID("old"); got != boot {
		t.Errorf("the pod runs in boot %s, before the upgrade in %s", got, boot)
	}
	b.start("new", nil, "sleep", "1000")
	if got := b.buildOf("new"); got != newBuild {
		t.Errorf("a new pod runs under build %q, want %s", got, newBuild)
	}
	b.ok("tasks", "kill", "--signal", "KILL", "old")
	if got := b.waitTask("old"); got != 137 {
		t.Errorf("status %d, want 137", got)
	}
	b.remove("old")

	b.killShim("crashed")
	b.remove("crashed") // containerd has called the new program's delete by then
	b.down(true)
	b.killShim("orphan")
	gc := exec.Command(filepath.Join(buildDir(t), "bin", "kata-ctl"), "gc", "--state-dir", b.c.PodsDir())
	if out, err := gc.CombinedOutput(); err != nil || !strings.Contains(string(out), "orphan") {
		t.Errorf("kata-ctl gc: %v: %s", err, out)
	}
	b.up()
	b.remove("orphan")
	if got := b.bootID("new"); got == boot {
		t.Error("two pods run in one boot")
	}
	b.remove("new")
}

func copyProgram(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, data, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// buildOf is the version of the shim that made a pod, as its ledger has it.
func (b *box) buildOf(id string) string {
	b.Helper()
	address := readFile(b.T, filepath.Join(b.c.Bundle(id), "address"))
	dir := filepath.Dir(strings.TrimPrefix(address, "unix://"))
	first, _, _ := strings.Cut(readFile(b.T, filepath.Join(dir, "ledger")), "\n")
	var header struct{ Build string }
	if err := json.Unmarshal([]byte(first), &header); err != nil || header.Build == "" {
		b.Fatalf("the ledger of %s begins with %q: %v", id, first, err)
	}
	return header.Build
}

// killShim kills the shim of a task and waits until it is gone.
func (b *box) killShim(id string) {
	b.Helper()
	r, err := b.dialShim(id).Connect(calls(b.T), &task.ConnectRequest{ID: id})
	if err != nil {
		b.Fatal(err)
	}
	fd, err := unix.PidfdOpen(int(r.ShimPid), 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		b.Fatal(err)
	}
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 5000); n != 1 {
		b.Fatalf("the killed shim of %s is still there: %v", id, err)
	}
}
