// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// longSize is what goes through one stream, in bytes.
const longSize = 64 << 20

// longFile writes a file of longSize random bytes into a directory of its own.
func longFile(b *box) (dir string, content []byte) {
	b.Helper()
	dir, content = b.TempDir(), randomBytes(longSize)
	if err := os.WriteFile(filepath.Join(dir, "long"), content, 0o644); err != nil {
		b.Fatal(err)
	}
	return dir, content
}

// wantBytes compares by digest, so that a failure does not print megabytes.
func (b *box) wantBytes(what string, got, want []byte) {
	b.Helper()
	g, w := sha256.Sum256(got), sha256.Sum256(want)
	if g == w {
		return
	}
	same := 0
	for same < len(got) && same < len(want) && got[same] == want[same] {
		same++
	}
	b.Errorf("%s: %d bytes with digest %x, want %d with %x; they differ at byte %d", what, len(got), g, len(want), w, same)
}

// testLongOutput: 64 MiB through stdout by ctr, which deletes as soon as the
// process has ended.
func testLongOutput(b *box) {
	dir, content := longFile(b)
	began := time.Now()
	r := b.runSpec("output", member(b.T, "cat", "/in/long").mount("bind", dir, "/in", "rbind", "ro"))
	if r.Code != 0 {
		b.Errorf("status %d: %s", r.Code, r.Stderr)
	}
	b.wantBytes("stdout", []byte(r.Stdout), content)
	b.Logf("64 MiB from a shared file through stdout, container's start and end included: %v", time.Since(began).Round(time.Millisecond))
}

// testLongInput: 64 MiB through stdin, hashed in the guest.
func testLongInput(b *box) {
	content := randomBytes(longSize)
	began := time.Now()
	r := b.ctrWith(bytes.NewReader(content), b.execArgs(podID, nil, []string{"sha256sum"})...)
	b.want(r, 0, fmt.Sprintf("%x  -\n", sha256.Sum256(content)))
	b.Logf("64 MiB through stdin and sha256sum: %v", time.Since(began).Round(time.Millisecond))
}
