// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// TestProgram: one copy for all calls, that of the first one; it can be executed, and
// not be written by any way to it.
func TestProgram(t *testing.T) {
	path := filepath.Join(t.TempDir(), "engine")
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(own)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, want, 0o755); err != nil {
		t.Fatal(err)
	}
	p := program(path)
	defer runtime.KeepAlive(p)
	name, err := p()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if again, err := p(); err != nil || again != name {
		t.Errorf("the second call: %q, %v; want %q", again, err, name)
	}
	if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the copy: %d bytes of %d, %v", len(got), len(want), err)
	}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// What crun wants to find, no less and no more (libcrun/cloned_binary.c).
	if got, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0); err != nil || got != 0xf {
		t.Errorf("seals %#x, %v; want 0xf", got, err)
	}
	if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("write: %v; want EPERM", err)
	}
	if err := f.Truncate(0); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("truncate: %v; want EPERM", err)
	}
	f.Close()
	if out, err := exec.Command(name, "-test.run=^$").CombinedOutput(); err != nil {
		t.Errorf("execute it: %v, %s", err, out)
	}
}

func TestProgramMissing(t *testing.T) {
	if name, err := program(filepath.Join(t.TempDir(), "none"))(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%q, %v; want that it does not exist", name, err)
	}
}
