// SPDX-License-Identifier: Apache-2.0

package podinit

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kata-v2/kata/guest-agent/reaper"
)

func TestMain(m *testing.M) {
	if os.Args[0] == Name {
		fmt.Fprintln(os.Stderr, Main())
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// A namespace with this first process: it survives signals from within, holds no
// privilege, and leaves no zombie.
func TestPodInit(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("root is needed: namespaces and mounts are made")
	}
	r := reaper.New()
	ctx, cancel := context.WithCancel(context.Background())
	reaping := make(chan struct{})
	go func() { defer close(reaping); r.Run(ctx) }()
	defer func() { cancel(); <-reaping }()
	bound, done := context.WithTimeout(ctx, 10*time.Second)
	defer done()
	pid, gone, err := Start(bound, r)
	if err != nil {
		t.Fatal(err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", fmt.Sprintf("NSpid:\t%d\t1", pid)} {
		if !strings.Contains(string(status), line) && !strings.Contains(string(status), "\t1\n") {
			t.Errorf("no %q in its status", line)
		}
	}
	if entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/root/", pid)); err != nil || len(entries) != 0 {
		t.Errorf("its root holds %v, %v", entries, err)
	}
	if up, err := os.ReadDir(fmt.Sprintf("/proc/%d/root/../../..", pid)); err != nil || len(up) != 0 {
		t.Errorf("above its root there is %v, %v", up, err)
	}
	// nsenter's child runs in the namespace; its orphan is left to process 1.
	// Counted by the shell itself, which has no child then: what is left are 1 and the shell.
	script := "kill -TERM 1; kill -INT 1; kill -9 1; (sleep 0.1 & exec true); i=0; set -- /proc/[0-9]*; " +
		"while [ $# -gt 2 ] && [ $i -lt 200 ]; do sleep 0.1; i=$((i+1)); set -- /proc/[0-9]*; done; echo $#"
	enter := fmt.Sprintf("exec nsenter -t %d -p unshare -m sh -c 'mount -t proc proc /proc; %s'", pid, script)
	out := runReaped(t, r, enter)
	if strings.TrimSpace(out) != "2" {
		t.Errorf("processes in the namespace: %q; want 1 and the shell", out)
	}
	select {
	case st := <-gone:
		t.Fatalf("it ended: %+v", st)
	default:
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-gone
}

// runReaped runs a script as a child of the reaper, which alone may wait for it.
func runReaped(t *testing.T, r *reaper.Reaper, script string) string {
	t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	_, gone, err := r.Start(sh, []string{"sh", "-c", script}, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, write.Fd(), write.Fd()}})
	write.Close()
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	buf := make([]byte, 4096)
	for {
		n, err := read.Read(buf)
		out.Write(buf[:n])
		if err != nil {
			break
		}
	}
	if st := <-gone; st.Code != 0 {
		t.Errorf("%s: status %d, output %q", script, st.Code, out.String())
	}
	return out.String()
}

// Whatever ends before it is ready is an error, and nothing is left.
func TestStartGivenUp(t *testing.T) {
	r := reaper.New()
	ctx, cancel := context.WithCancel(context.Background())
	reaping := make(chan struct{})
	go func() { defer close(reaping); r.Run(ctx) }()
	defer func() { cancel(); <-reaping }()
	over, stop := context.WithCancel(ctx)
	stop()
	if _, _, err := Start(over, r); err == nil {
		t.Error("it started although nobody waits")
	}
}
