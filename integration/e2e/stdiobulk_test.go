// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
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

// testLongInput: 8 MiB through stdin by ctr, hashed in the guest, where that
// takes longer than the way.
func testLongInput(b *box) {
	content := randomBytes(8 << 20)
	r := b.ctrWith(bytes.NewReader(content), b.execArgs(podID, nil, []string{"sha256sum"})...)
	b.want(r, 0, fmt.Sprintf("%x  -\n", sha256.Sum256(content)))
}

// bulkEnv makes testBulk carry bulkAll instead of bulkUsual; `make test-all` sets it.
const (
	bulkEnv   = "KATA_TEST_ALL"
	bulkUsual = 256 << 20
	bulkAll   = 1 << 30
)

// testBulk: a gibibyte (a quarter of one in the usual run) through stdin and back
// through stdout at the same time, with its digest.
func testBulk(b *box) {
	size := int64(bulkUsual)
	if os.Getenv(bulkEnv) != "" {
		size = bulkAll
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	limit, _ := ctx.Deadline()
	pipes := newPipes(b.T)
	out, in := open(b.T, pipes.stdout, os.O_RDWR), open(b.T, pipes.stdin, os.O_RDWR)
	if err := errors.Join(out.SetDeadline(limit), in.SetDeadline(limit)); err != nil {
		b.Fatal(err)
	}
	x := b.dialShim(stdioPod).addExec(ctx, stdioPod, process("cat"), pipes)
	began := time.Now()
	sent, written := sha256.New(), make(chan error, 1)
	go func() {
		random := io.LimitReader(rand.NewChaCha8([32]byte{2}), size)
		_, err := io.CopyBuffer(struct{ io.Writer }{in}, io.TeeReader(random, sent), make([]byte, 256<<10))
		written <- err
	}()
	got := sha256.New()
	n, err := io.CopyBuffer(got, io.LimitReader(out, size), make([]byte, 256<<10))
	if err != nil || n != size {
		b.Errorf("%d bytes came back, %v; want %d", n, err, size)
	}
	if err := receive(b.T, "the writing", written); err != nil {
		b.Error(err)
	}
	took := time.Since(began)
	in.Close()
	x.closeStdin()
	x.end(0)
	if g, w := got.Sum(nil), sent.Sum(nil); !bytes.Equal(g, w) {
		b.Errorf("digest %x of what came back, %x of what was sent", g, w)
	}
	b.Logf("%d MiB there and back: %v", size>>20, took.Round(time.Millisecond))
}
