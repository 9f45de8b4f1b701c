// SPDX-License-Identifier: Apache-2.0

package images

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// set makes a directory with two image files and their manifest.
func set(t *testing.T) (dir string, m *Manifest) {
	t.Helper()
	dir = t.TempDir()
	m = &Manifest{Version: "test"}
	for _, name := range []string{KernelFile, InitrdFile} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("content of "+name), 0o644); err != nil {
			t.Fatal(err)
		}
		f, err := Describe(path)
		if err != nil {
			t.Fatal(err)
		}
		m.Files = append(m.Files, f)
	}
	path := filepath.Join(dir, ManifestFile)
	if err := m.Write(path); err != nil {
		t.Fatal(err)
	}
	m, err := ReadManifest(path)
	if err != nil {
		t.Fatal(err)
	}
	return dir, m
}

func TestVerify(t *testing.T) {
	dir, m := set(t)
	if err := m.Verify(dir); err != nil {
		t.Fatal(err)
	}
	for what, content := range map[string]string{"size": "short", "sha256": "Content of " + InitrdFile} {
		if err := os.WriteFile(filepath.Join(dir, InitrdFile), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		var mismatch *MismatchError
		err := m.Verify(dir)
		if !errors.As(err, &mismatch) || mismatch.What != what || mismatch.Path != filepath.Join(dir, InitrdFile) {
			t.Fatalf("got %v; want a mismatch of the %s of %s", err, what, InitrdFile)
		}
		for _, part := range []string{mismatch.Path, mismatch.Expected, mismatch.Have, ManifestFile} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%q lacks %q", err, part)
			}
		}
	}
	if err := os.Remove(filepath.Join(dir, KernelFile)); err != nil {
		t.Fatal(err)
	}
	if err := m.Verify(dir); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), KernelFile) {
		t.Errorf("got %v; want the missing file named", err)
	}
	if err := m.VerifyFile("/elsewhere/other.img"); err == nil || !strings.Contains(err.Error(), "vmlinux, kata-initrd.img") {
		t.Errorf("got %v; want the files that the manifest names", err)
	}
}

func TestReadManifestNamesTheField(t *testing.T) {
	good := `"files":[{"name":"a","sha256":"` + strings.Repeat("0", 64) + `","size":1}]`
	for content, want := range map[string]string{
		`{`:                                      "unexpected end",
		`{"format":2,` + good + `}`:              "format is 2: want 1",
		`{"format":1}`:                           "files is empty",
		`{"format":1,"files":[{"name":"../a"}]}`: "files[0].name",
		`{"format":1,"files":[{"name":"a","sha256":"12"}]}`:                           "files[0].sha256",
		`{"format":1,` + strings.Replace(good, ":1}", ":-1}", 1) + `}`:                "files[0].size",
		`{"format":1,"files":[` + strings.Repeat(good[9:len(good)-1]+",", 2) + `{}]}`: "is there twice",
	} {
		path := filepath.Join(t.TempDir(), "m.json")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadManifest(path); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: got %v; want %q and the path", content, err, want)
		}
	}
}

// knownNow writes the stamp that a verification of settled files would leave. The
// change time of a file cannot be set back, and waiting for it would be slow.
func knownNow(t *testing.T, stampDir string, m *Manifest, paths ...string) {
	t.Helper()
	known := stamp{}
	for _, p := range paths {
		f, err := os.Open(p)
		if err != nil {
			t.Fatal(err)
		}
		id, err := identify(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		want, err := m.lookup(p)
		if err != nil {
			t.Fatal(err)
		}
		known[p] = verified{Identity: id, SHA256: want.SHA256}
	}
	if err := writeStamp(filepath.Join(stampDir, stampFile), known); err != nil {
		t.Fatal(err)
	}
}

func TestVerifyCachedBelievesOnlyTheSameFile(t *testing.T) {
	dir, m := set(t)
	stamps := filepath.Join(t.TempDir(), "stamps")
	kernel, initrd := filepath.Join(dir, KernelFile), filepath.Join(dir, InitrdFile)
	if err := m.VerifyCached(stamps, kernel, initrd); err != nil {
		t.Fatal(err)
	}
	// Files this fresh are verified but not remembered.
	if got := readStamp(filepath.Join(stamps, stampFile)); len(got) != 0 {
		t.Fatalf("remembered %v of files that changed just now", got)
	}
	knownNow(t, stamps, m, kernel, initrd)

	// A manifest with another digest is not satisfied by the stamp.
	other := *m
	other.Files = append([]File(nil), m.Files...)
	other.Files[0].SHA256 = strings.Repeat("0", 64)
	if err := other.VerifyCached(stamps, kernel, initrd); err == nil {
		t.Error("the stamp of another digest was believed")
	}
	// Same size, same mtime, other content: the change time and the inode tell.
	info, err := os.Stat(kernel)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(kernel, []byte("Content of "+KernelFile), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(kernel, info.ModTime(), info.ModTime()); err != nil {
		t.Fatal(err)
	}
	var mismatch *MismatchError
	if err := m.VerifyCached(stamps, kernel, initrd); !errors.As(err, &mismatch) || mismatch.Path != kernel {
		t.Errorf("got %v; want a mismatch of %s", err, kernel)
	}
}

func TestVerifyCachedUsesTheStamp(t *testing.T) {
	dir, m := set(t)
	stamps, kernel := t.TempDir(), filepath.Join(dir, KernelFile)
	if err := os.Chmod(stamps, 0o700); err != nil {
		t.Fatal(err)
	}
	// The stamp says that the present content, whatever it is, has the manifest's digest.
	if err := os.WriteFile(kernel, []byte("Content of "+KernelFile), 0o644); err != nil {
		t.Fatal(err)
	}
	knownNow(t, stamps, m, kernel)
	if err := m.VerifyCached(stamps, kernel); err != nil {
		t.Fatalf("the file was read although the stamp knows it: %v", err)
	}
	// Writable by others, or not a plain file: not believed.
	name := filepath.Join(stamps, stampFile)
	if err := os.Chmod(name, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := m.VerifyCached(stamps, kernel); err == nil {
		t.Error("a stamp that others can write was believed")
	}
	if err := os.Chmod(name, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(name, name+".real"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(name+".real", name); err != nil {
		t.Fatal(err)
	}
	if err := m.VerifyCached(stamps, kernel); err == nil {
		t.Error("a stamp behind a symbolic link was believed")
	}
	if err := os.Chmod(stamps, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := m.VerifyCached(stamps, kernel); err == nil || !strings.Contains(err.Error(), "0777") {
		t.Errorf("got %v; want the directory's mode refused", err)
	}
}

func TestStampIsWrittenForSettledFiles(t *testing.T) {
	// The program of this test was written before it started; it is old enough
	// when its start took longer than settle, else the wait is for the rest.
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	f, err := Describe(exe)
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(exe)
	if err != nil {
		t.Fatal(err)
	}
	id, err := identify(file)
	file.Close()
	if err != nil {
		t.Fatal(err)
	}
	<-time.After(time.Until(time.Unix(0, id.CTime).Add(settle)))
	m := &Manifest{Files: []File{f}}
	stamps := filepath.Join(t.TempDir(), "stamps")
	if err := m.VerifyCached(stamps, exe); err != nil {
		t.Fatal(err)
	}
	if got := readStamp(filepath.Join(stamps, stampFile)); got[exe].SHA256 != f.SHA256 {
		t.Errorf("stamp is %v; want the digest of %s", got, exe)
	}
}
