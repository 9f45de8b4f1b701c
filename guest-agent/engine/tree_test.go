// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestEndTree: a process, what it started, and what that started end together.
// All hold a pipe, which is at its end when none is left.
func TestEndTree(t *testing.T) {
	cmd := exec.Command("sh", "-c", "sh -c 'sleep 1000 & sleep 1001; :' & echo up; read wait")
	cmd.Stdin = nil
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	in, hold, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer hold.Close()
	cmd.Stdin, cmd.Stdout = in, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	in.Close()
	if b := make([]byte, 3); true {
		if _, err := io.ReadFull(r, b); err != nil || string(b) != "up\n" {
			t.Fatalf("%q, %v", b, err)
		}
	}
	pidfd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	doing := endTree(cmd.Process.Pid, pidfd)
	if !strings.HasPrefix(doing, "sh ") {
		t.Errorf("it was doing %q", doing)
	}
	if rest, err := io.ReadAll(r); err != nil || len(rest) > 0 {
		t.Errorf("%q, %v", rest, err)
	}
	if err := cmd.Wait(); err == nil || cmd.ProcessState.Sys() == nil {
		t.Errorf("the first one: %v", err)
	}
}

func TestTree(t *testing.T) {
	root := t.TempDir()
	for pid, stat := range map[int]string{
		1: "1 (init) S 0 0", 10: "10 (a) b (c) R 1 1 1", 11: "11 (crun) S 10 0", 12: "12 (x) D 11 0", 13: "13 (other) S 1 0", 14: "nonsense", 15: "15 (y) Z 12 0",
	} {
		dir := filepath.Join(root, strconv.Itoa(pid))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "stat"), []byte(stat), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "12", "wchan"), []byte("fuse_wait"), 0o644); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, p := range tree(root, 10) {
		got = append(got, p.describe(root))
	}
	if want := "a) b (c R; crun S; x D in fuse_wait; y Z"; strings.Join(got, "; ") != want {
		t.Errorf("got %q; want %q", got, want)
	}
	if got := tree(root, 99); got != nil {
		t.Errorf("of nobody: %v", got)
	}
}
