// SPDX-License-Identifier: Apache-2.0

package cpio

import (
	"bytes"
	"errors"
	"os/exec"
	"strings"
	"testing"
)

// TestListedByBusybox lets a reader of another origin take the archive apart.
func TestListedByBusybox(t *testing.T) {
	var buf bytes.Buffer
	err := Write(&buf, []Entry{
		File("usr/bin/tool", 0o755, []byte("12345")),
		Symlink("bin", "usr/bin"),
		CharDevice("dev/console", 0o600, 5, 1),
		Dir("tmp", 0o1777),
		File("empty", 0o644, nil),
	})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("busybox", "cpio", "-tv")
	cmd.Stdin = &buf
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, want := range []string{"drwxrwxrwt", "crw-------", "-rwxr-xr-x", "bin -> usr/bin", "usr/bin/tool", "drwxr-xr-x"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("listing lacks %q:\n%s", want, out)
		}
	}
}

func TestDeterministicAndAligned(t *testing.T) {
	entries := []Entry{File("b", 0o644, []byte("x")), File("a/b/c", 0o644, []byte("yz"))}
	var one, two bytes.Buffer
	if err := Write(&one, entries); err != nil {
		t.Fatal(err)
	}
	if err := Write(&two, []Entry{entries[1], entries[0]}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(one.Bytes(), two.Bytes()) {
		t.Error("the order of the entries shows in the archive")
	}
	if one.Len()%4 != 0 {
		t.Errorf("archive of %d bytes is not padded", one.Len())
	}
}

func TestRefusesBadNames(t *testing.T) {
	for _, bad := range [][]Entry{
		{File("/abs", 0o644, nil)}, {File("../out", 0o644, nil)}, {File("a//b", 0o644, nil)}, {File("", 0o644, nil)}, {Dir(".", 0o755)},
		{File("twice", 0o644, nil), Dir("twice", 0o755)},
		{File("file", 0o644, nil), File("file/below", 0o644, nil)},
	} {
		if err := Write(&bytes.Buffer{}, bad); err == nil {
			t.Errorf("%v was accepted", bad)
		}
	}
}

type fullWriter struct{ left int }

func (w *fullWriter) Write(p []byte) (int, error) {
	if w.left -= len(p); w.left < 0 {
		return 0, errors.New("no space")
	}
	return len(p), nil
}

func TestReportsWriteError(t *testing.T) {
	entries := []Entry{File("f", 0o644, []byte("data"))}
	var whole bytes.Buffer
	if err := Write(&whole, entries); err != nil {
		t.Fatal(err)
	}
	for room := range whole.Len() {
		if err := Write(&fullWriter{room}, entries); err == nil {
			t.Fatalf("no error from a writer with room for %d bytes", room)
		}
	}
}
