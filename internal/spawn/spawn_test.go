// SPDX-License-Identifier: Apache-2.0

package spawn

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
)

func TestChildDiesWithThread(t *testing.T) {
	th := NewThread()
	cmd := exec.Command("sleep", "1000")
	if err := th.Start(cmd); err != nil {
		t.Fatal(err)
	}
	th.Close()
	err := cmd.Wait()
	var ee *exec.ExitError
	if !errors.As(err, &ee) || ee.String() != "signal: killed" {
		t.Fatalf("child ended with %v, want killed by the parent-death signal", err)
	}
	if err := th.Do(func() error { return nil }); !errors.Is(err, ErrClosed) {
		t.Fatalf("Do after Close: %v", err)
	}
}

func TestNewNetNSIsSeenByChild(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root")
	}
	th := NewThread()
	defer th.Close()
	if err := th.EnterNetNS(""); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	if err := th.Start(cmd); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	child, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if own == child {
		t.Fatalf("child shares %s with its parent", own)
	}
	// A second thread joins the first one's namespace by its path.
	th2 := NewThread()
	defer th2.Close()
	if err := th2.EnterNetNS(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid)); err != nil {
		t.Fatal(err)
	}
	var got string
	if err := th2.Do(func() (err error) { got, err = os.Readlink("/proc/thread-self/ns/net"); return err }); err != nil {
		t.Fatal(err)
	}
	if got != child {
		t.Fatalf("joined %s, want %s", got, child)
	}
}

func TestMissingNetNS(t *testing.T) {
	th := NewThread()
	defer th.Close()
	if err := th.EnterNetNS("/nonexistent"); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("got %v", err)
	}
}
