// SPDX-License-Identifier: Apache-2.0

package checkpoint

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// sparse is a file of 1 MiB with some bytes in it.
func sparse(t *testing.T, text string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "sparse"))
	must(t, err)
	t.Cleanup(func() { f.Close() })
	must(t, f.Truncate(1<<20))
	_, err = f.WriteAt([]byte(text), 500000)
	must(t, err)
	return f
}

// save makes a checkpoint with a disk that is written and one that is not.
func save(t *testing.T, dir string) {
	t.Helper()
	w, err := Create(dir)
	must(t, err)
	s, err := w.State()
	must(t, err)
	_, err = s.WriteString("devices")
	must(t, err)
	must(t, s.Close())
	m := Manifest{Sandbox: "pod"}
	m.Memory, err = w.Memory(sparse(t, "memory"))
	must(t, err)
	content, err := w.Disk("disk1", sparse(t, "written"))
	must(t, err)
	file := sparse(t, "layer")
	layer, err := DigestOf(file)
	must(t, err)
	head, err := w.Part("disk0", 1, sparse(t, "head"))
	must(t, err)
	m.Disks = []Disk{{ID: "disk0", ReadOnly: true, Parts: []Part{{File: layer, Path: file.Name()}, {File: head}}}, {ID: "disk1", Content: &content}}
	must(t, w.Finish(m))
}

func TestSaveAndLoad(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "c")
	save(t, dir)
	c, err := Open(dir)
	must(t, err)
	must(t, c.Verify())
	if c.Sandbox != "pod" || c.Version != formatVersion || c.State.Bytes != 7 {
		t.Errorf("manifest %+v", c.Manifest)
	}
	f, err := c.LoadMemory()
	must(t, err)
	defer f.Close()
	got := make([]byte, 6)
	_, err = f.ReadAt(got, 500000)
	must(t, err)
	if st, err := f.Stat(); err != nil || st.Size() != 1<<20 || string(got) != "memory" {
		t.Errorf("memory: %q, %v", got, err)
	}
	disk := sparse(t, "what was there before, which must go")
	must(t, c.LoadDisk(c.Disks[1], disk))
	all, err := os.ReadFile(disk.Name())
	must(t, err)
	if !bytes.Equal(bytes.Trim(all, "\x00"), []byte("written")) || len(all) != 1<<20 {
		t.Errorf("disk: %q", bytes.Trim(all, "\x00"))
	}
	if _, err := Create(dir); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second one in the same directory: %v", err)
	}
}

// A checkpoint that is not whole, or that others can change, is refused with the reason.
func TestBroken(t *testing.T) {
	overwrite := func(name, text string) func(string) error {
		return func(dir string) error {
			f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0)
			if err == nil {
				_, err = f.WriteAt([]byte(text), 0)
				f.Close()
			}
			return err
		}
	}
	for name, c := range map[string]struct {
		harm func(dir string) error
		open string // what Open says, empty when only the content is wrong
	}{
		"no manifest":      {func(dir string) error { return os.Remove(filepath.Join(dir, manifestFile)) }, "no such file"},
		"no disk":          {func(dir string) error { return os.Remove(filepath.Join(dir, "disk-disk1")) }, "no such file"},
		"short memory":     {func(dir string) error { return os.Truncate(filepath.Join(dir, memoryFile), 4096) }, "memory does not have 1048576 bytes: it is truncated"},
		"short state":      {func(dir string) error { return os.Truncate(filepath.Join(dir, stateFile), 0) }, "state does not have 7 bytes"},
		"other version":    {overwrite(manifestFile, "{\n  \"version\": 7"), "version 7: this build reads 2"},
		"no JSON":          {overwrite(manifestFile, "?"), "manifest.json: invalid character"},
		"group may write":  {func(dir string) error { return os.Chmod(filepath.Join(dir, stateFile), 0o660) }, "writable by nobody else"},
		"others may write": {func(dir string) error { return os.Chmod(dir, 0o777) }, "writable by nobody else"},
		"another's":        {func(dir string) error { return os.Chown(filepath.Join(dir, memoryFile), 1, 1) }, "owner 1"},
		"a link": {func(dir string) error {
			path := filepath.Join(dir, stateFile)
			if err := os.Rename(path, path+"2"); err != nil {
				return err
			}
			return os.Symlink(path+"2", path)
		}, "want a file of type"},
		"memory":       {overwrite(memoryFile, "x"), ""},
		"state":        {overwrite(stateFile, "x"), ""},
		"disk":         {overwrite("disk-disk1", "x"), ""},
		"disk-disk0-1": {overwrite("disk-disk0-1", "x"), ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "c")
			save(t, dir)
			must(t, c.harm(dir))
			got, err := Open(dir)
			if c.open != "" {
				if err == nil || !strings.Contains(err.Error(), c.open) || !errdefs.IsInvalidArgument(err) && !errdefs.IsNotFound(err) {
					t.Errorf("Open: %v; want %q", err, c.open)
				}
				return
			}
			must(t, err)
			if err := got.Verify(); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), name) {
				t.Errorf("Verify: %v", err)
			}
		})
	}
	if _, err := Open("relative"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a relative path: %v", err)
	}
}

// What fails leaves the directory as it was.
func TestAbort(t *testing.T) {
	there := t.TempDir()
	for _, dir := range []string{there, filepath.Join(there, "new")} {
		w, err := Create(dir)
		must(t, err)
		s, err := w.State()
		must(t, err)
		s.Close()
		if _, err := w.Memory(sparse(t, "x")); err != nil {
			t.Fatal(err)
		}
		must(t, w.Abort())
	}
	if left, err := os.ReadDir(there); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	must(t, os.WriteFile(filepath.Join(there, "mine"), nil, 0o600))
	if _, err := Create(there); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a directory that is in use: %v", err)
	}
	if _, err := Create(filepath.Join(there, "a", "b")); err == nil {
		t.Error("a directory below none")
	}
}

// A disk whose container is not there yet is opened from what the checkpoint names
// and keeps; what is written goes into a copy.
func TestOpenDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "c")
	save(t, dir)
	c, err := Open(dir)
	must(t, err)
	for i, want := range []string{"layer", "head", "written"} {
		d, err := c.OpenDisk(c.Disks[i/2])
		must(t, err)
		defer d.Close()
		f := d.Parts[i%2].File
		got := make([]byte, len(want))
		if _, err := f.ReadAt(got, 500000); err != nil || string(got) != want {
			t.Errorf("disk %s, part %d: %q, %v", d.ID, i%2, got, err)
		}
		if _, err := f.WriteAt([]byte("x"), 500000); d.ReadOnly != (err != nil) {
			t.Errorf("disk %s: a write: %v", d.ID, err)
		}
	}
	must(t, c.Verify()) // nothing has changed
	layer := c.Disks[0].Parts[0].Path
	must(t, os.Truncate(layer, 7))
	if _, err := c.OpenDisk(c.Disks[0]); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "needs the same image") {
		t.Errorf("another layer: %v", err)
	}
	must(t, os.Remove(layer))
	if _, err := c.OpenDisk(c.Disks[0]); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "must be where they were") {
		t.Errorf("no layer: %v", err)
	}
}

// The disk of a restored container is a file.
func TestLoadDiskRefuses(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "c")
	save(t, dir)
	c, err := Open(dir)
	must(t, err)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	must(t, err)
	defer null.Close()
	if err := c.LoadDisk(c.Disks[1], null); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a device: %v", err)
	}
}
