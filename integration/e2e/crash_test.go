// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/integration/lab"
)

// endLimit is how soon a task must end after one of its processes was killed.
const endLimit = 5 * time.Second

// family are the host's processes of one pod.
type family struct{ shim, vmm, daemon, worker int }

// children lists the processes whose parent is pid, with their commands.
func children(t *testing.T, pid int) map[int]string {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	out := map[int]string{}
	for _, path := range stats {
		data, _ := os.ReadFile(path)
		// proc_pid_stat(5): pid (name) state parent …
		head, tail, ok := strings.Cut(string(data), ") ")
		f := strings.Fields(tail)
		if !ok || len(f) < 2 || f[1] != strconv.Itoa(pid) {
			continue
		}
		id, _, _ := strings.Cut(head, " (")
		if n, err := strconv.Atoi(id); err == nil {
			// The name alone would not do: a program may run by way of a loader.
			command, _ := os.ReadFile(filepath.Join("/proc", id, "cmdline"))
			out[n] = strings.ReplaceAll(string(command), "\x00", " ")
		}
	}
	return out
}

// family finds the processes of a running task.
func (b *box) family(id string) family {
	b.Helper()
	r, err := b.dialShim(id).Connect(calls(b.T), &task.ConnectRequest{ID: id})
	if err != nil {
		b.Fatal(err)
	}
	f := family{shim: int(r.ShimPid)}
	for pid, command := range children(b.T, f.shim) {
		switch {
		case strings.Contains(command, "qemu-system"):
			f.vmm = pid
		case strings.Contains(command, "virtiofsd"):
			f.daemon = pid
		}
	}
	for pid := range children(b.T, f.daemon) {
		f.worker = pid
	}
	if f.vmm == 0 || f.daemon == 0 || f.worker == 0 {
		b.Fatalf("processes of the shim %d: %v, %v; want QEMU and a virtiofsd with a child", f.shim, children(b.T, f.shim), f)
	}
	return f
}

// background runs ctr until it ends by itself.
func (b *box) background(args ...string) <-chan lab.Result {
	b.Helper()
	out := make(chan lab.Result, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		out <- b.ctr(args...)
	}()
	b.Cleanup(func() { <-done })
	return out
}

// awaitStarted waits until the shim has logged a container's start.
func (b *box) awaitStarted(id string) {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	if _, err := b.c.WaitLog(ctx, func(l string) bool { return lab.Started(l) && strings.Contains(l, "container="+id+" ") }); err != nil {
		b.Fatal(err)
	}
}

// TestSIGKILL: whichever of a pod's processes is killed, the client learns of
// the end within seconds, the task can be removed, and nothing is left.
func TestSIGKILL(t *testing.T) {
	for _, c := range []struct {
		name string
		pid  func(family) int
	}{
		{"shim", func(f family) int { return f.shim }},
		{"qemu", func(f family) int { return f.vmm }},
		{"virtiofsd", func(f family) int { return f.daemon }},
		{"virtiofsd-worker", func(f family) int { return f.worker }},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBox(t)
			id := "killed-" + c.name
			dir := t.TempDir()
			// ctr leaves its pipes behind when a shim vanishes under it, whatever
			// the runtime: they are not put where this test looks for leftovers.
			pipes := []string{"--fifo-dir", t.TempDir()}
			client := b.background(b.c.RunArgs(runtimeName, id, append(pipes, "--mount", "type=bind,src="+dir+",dst=/d,options=rbind:rw"), "sleep", "1000")...)
			b.awaitStarted(id)
			f := b.family(id)
			exec := b.background(append([]string{"tasks", "exec", "--exec-id", execID()}, append(pipes, id, "sh", "-c", "echo up >/d/up; sleep 1000")...)...)
			b.awaitFile(filepath.Join(dir, "up"), "up")
			began := time.Now()
			if err := unix.Kill(c.pid(f), unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			for what, ch := range map[string]<-chan lab.Result{"run": client, "exec": exec} {
				select {
				case r := <-ch:
					t.Logf("ctr %s ended after %v with status %d: %s", what, time.Since(began).Round(time.Millisecond), r.Code, strings.TrimSpace(r.Stderr))
					// With its shim gone containerd has nobody to ask: ctr reports that instead.
					if want := 128 + int(unix.SIGKILL); r.Code != want && (c.name != "shim" || r.Code == 0) {
						t.Errorf("ctr %s ended with status %d, want %d", what, r.Code, want)
					}
				case <-time.After(time.Until(began.Add(endLimit))):
					t.Errorf("ctr %s did not end within %v", what, endLimit)
				}
			}
			b.remove(id)
			t.Logf("removed %v after the kill", time.Since(began).Round(time.Millisecond))
		})
	}
}

// shimOf finds the shim of a container whose machine may not have started yet.
func (b *box) shimOf(id string) int {
	b.Helper()
	pids, err := b.c.Processes()
	if err != nil {
		b.Fatal(err)
	}
	for _, pid := range pids {
		// The daemon's arguments name nothing but namespace and pod.
		command, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if f := strings.Split(strings.TrimSuffix(string(command), "\x00"), "\x00"); len(f) == 5 && f[0] == shimProgram(b.T) && f[4] == id {
			return pid
		}
	}
	b.Fatalf("no shim of %s among %v", id, pids)
	return 0
}

// awaitVMM waits until a shim has a QEMU.
func (b *box) awaitVMM(shim int) {
	b.Helper()
	for deadline := time.Now().Add(callTimeout); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		for _, command := range children(b.T, shim) {
			if strings.Contains(command, "qemu-system") {
				return
			}
		}
	}
	b.Fatalf("shim %d has no QEMU", shim)
}

// TestKillWhileStarting: the same when the machine has not booted yet, and when
// the client goes away instead.
func TestKillWhileStarting(t *testing.T) {
	for _, victim := range []string{"shim", "client"} {
		t.Run(victim, func(t *testing.T) {
			b := newBox(t)
			id := "early-" + victim
			ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
			defer cancel()
			b.Cleanup(func() { b.remove(id) })
			cmd := b.c.CtrCmd(ctx, b.c.RunArgs(runtimeName, id, []string{"--fifo-dir", t.TempDir()}, "sleep", "1000")...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			if _, err := b.c.WaitLog(ctx, func(l string) bool {
				return strings.Contains(l, "accelerator chosen") && strings.Contains(l, "sandbox="+id+" ")
			}); err != nil {
				t.Fatal(err)
			}
			shim := b.shimOf(id)
			b.awaitVMM(shim) // it boots for seconds from here
			pid := cmd.Process.Pid
			if victim == "shim" {
				pid = shim
			}
			if err := unix.Kill(pid, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			select {
			case err := <-ended:
				if err == nil {
					t.Error("ctr run ended with status 0")
				}
			case <-time.After(endLimit):
				t.Fatalf("ctr run did not end within %v", endLimit)
			}
		})
	}
}
