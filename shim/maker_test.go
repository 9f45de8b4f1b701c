// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A maker knows what to do only when it has been placed, and says why it failed.
func TestMakerWaitsForItsPlace(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out")
	sh := func(script string) *exec.Cmd { return exec.Command("/bin/sh", "-c", script) }
	nice := ""
	err := runPlaced(sh("cat >"+out), []byte("all"), func(pid int) error {
		if b, err := os.ReadFile(out); len(b) > 0 {
			t.Errorf("it has read %q before it was placed, %v", b, err)
		}
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if f := strings.Fields(string(stat)); len(f) > 18 { // proc_pid_stat(5): nice is the 19th
			nice = f[18]
		}
		return err
	})
	if b, rerr := os.ReadFile(out); err != nil || rerr != nil || string(b) != "all" {
		t.Errorf("%v; it has read %q, %v", err, b, rerr)
	}
	if nice != fmt.Sprint(makerNice) {
		t.Errorf("it is %s nice; want %d", nice, makerNice)
	}
	refused := errors.New("no place")
	if err := runPlaced(sh("[ -n \"$(cat)\" ] || exit 3"), []byte("all"), func(int) error { return refused }); !errors.Is(err, refused) || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("a maker without a place: %v", err)
	}
	if err := runPlaced(sh("cat >&2; exit 1"), []byte("no kernel"), func(int) error { return nil }); err == nil || !strings.Contains(err.Error(), "no kernel") {
		t.Errorf("a maker that fails: %v", err)
	}
	if err := runMaker(t.Context(), strings.NewReader("")); err == nil || !strings.Contains(err.Error(), "parameters") {
		t.Errorf("a maker without parameters: %v", err)
	}
}
