// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kata-v2/kata/integration/lab/leak"
)

// startLab starts a daemon for one test and checks that stopping it finds nothing left.
func startLab(t *testing.T, version string) *Containerd {
	t.Helper()
	leak.Check(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	c, err := Start(ctx, Options{Version: version, Snapshotter: "native"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Stop(context.Background()); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(c.log.tail(40))
		}
		if _, err := os.Stat(c.Root); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", c.Root, err)
		}
	})
	if err := c.ImportBusybox(ctx); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestRunWithRunc(t *testing.T) {
	for _, version := range []string{"1.6", "2.4"} {
		t.Run(version, func(t *testing.T) {
			c := startLab(t, version)
			r, err := c.Run(t.Context(), "io.containerd.runc.v2", "lab-run", nil, "sh", "-c", "id -un user; exit 7")
			if err != nil || r.Code != 7 || strings.TrimSpace(r.Stdout) != "user" {
				t.Fatalf("got %+v, %v; want exit 7 and the name user", r, err)
			}
		})
	}
}

func TestRestartKeepsTasks(t *testing.T) {
	c := startLab(t, "2.4")
	ctx := t.Context()
	if r, err := c.Ctr(ctx, c.RunArgs("io.containerd.runc.v2", "lab-stay", []string{"--detach"}, "sleep", "1000")...); err != nil || r.Code != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	before := c.PID()
	if err := c.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := c.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	if c.PID() == before {
		t.Fatalf("the daemon is still %d", before)
	}
	r, err := c.Ctr(ctx, "tasks", "ls")
	if err != nil || !strings.Contains(r.Stdout, "RUNNING") {
		t.Fatalf("after the restart: %+v, %v", r, err)
	}
	// The cleanup's Stop must remove the running task without finding leftovers.
}

func TestStopReportsLeftProcesses(t *testing.T) {
	leak.Check(t)
	ctx := t.Context()
	c, err := Start(ctx, Options{})
	if err != nil {
		t.Fatal(err)
	}
	// One by its environment, one by a path of the lab in its arguments.
	marked := exec.Command("sleep", "1001")
	marked.Env = []string{rootEnv + "=" + c.Root}
	named := exec.Command("sh", "-c", "sleep 1002; :", c.Root+"/pods/x.sock")
	named.Env = []string{}
	waited := make(chan error, 2)
	for _, cmd := range []*exec.Cmd{marked, named} {
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		go func() { waited <- cmd.Wait() }()
	}
	err = c.Stop(ctx)
	for _, want := range []string{"sleep 1001", "pods/x.sock"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Stop: %v; want %q named", err, want)
		}
	}
	<-waited
	<-waited
	_ = syscall.Kill(-named.Process.Pid, syscall.SIGKILL) // the shell's own child
	if err := c.Stop(ctx); err != nil {
		t.Errorf("second Stop: %v", err)
	}
}

func TestStartNamesTheCause(t *testing.T) {
	leak.Check(t)
	_, err := Start(t.Context(), Options{ExtraConfig: "this is no TOML\n"})
	if err == nil || !strings.Contains(err.Error(), "toml") {
		t.Fatalf("got %v; want the parser's complaint", err)
	}
	if _, err := Start(t.Context(), Options{Version: "9.9"}); err == nil || !strings.Contains(err.Error(), "1.6, 1.7, 2.2, 2.4") {
		t.Fatalf("got %v; want the versions that exist", err)
	}
}

func TestImageIsDeterministic(t *testing.T) {
	img := Image{Name: "example.invalid/x:1", Layers: [][]File{{{Path: "b", Data: []byte("1")}, {Path: "a/c", Link: "../b"}}}}
	var one, two bytes.Buffer
	if err := img.Write(&one); err != nil {
		t.Fatal(err)
	}
	if err := img.Write(&two); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(one.Bytes(), two.Bytes()) {
		t.Error("two writes of one image differ")
	}
}
