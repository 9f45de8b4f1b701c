// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
)

// testExitStatus: a status, and 128 plus the number of a signal.
func testExitStatus(b *box) {
	b.want(b.exec(podID, "true"), 0, "")
	b.want(b.exec(podID, "sh", "-c", "echo out; echo err >&2; exit 7"), 7, "out\n")
	b.want(b.exec(podID, "sh", "-c", "exit 255"), 255, "")
	b.want(b.exec(podID, "sh", "-c", "kill -TERM $$"), 128+15, "")
	b.want(b.exec(podID, "sh", "-c", "kill -KILL $$"), 128+9, "")
	if r := b.exec(podID, "sh", "-c", "echo err >&2"); r.Stderr != "err\n" {
		b.Errorf("stderr %q, want err", r.Stderr)
	}
}

// testExecEnvironment: ctr's exec copies the container's process, with another directory.
func testExecEnvironment(b *box) {
	r := b.ctr(b.execArgs(podID, []string{"--cwd", "/tmp"}, []string{"sh", "-c", "pwd; echo $PATH; cat /proc/self/comm"})...)
	b.want(r, 0, "/tmp\n/usr/sbin:/usr/bin:/sbin:/bin\ncat\n")
	// The same machine, another process: it sees the first one as number 1 of its namespace.
	if got := b.shell(podID, "tr '\\0' ' ' </proc/1/cmdline"); !strings.HasPrefix(got, "sleep 100000") {
		b.Errorf("process 1 of the container is %q, want sleep", got)
	}
}

// randomBytes are n bytes that no compression or run of zeros hides.
func randomBytes(n int) []byte {
	out := make([]byte, n)
	src := rand.NewChaCha8([32]byte{1})
	src.Read(out) //nolint:errcheck // documented never to fail
	return out
}

// testStdin: bytes arrive, and so does their end. (Whether ctr tells the end of
// an empty input is a race of its own; testEarlyCloseIO tests that.)
func testStdin(b *box) {
	for _, n := range []int{1, 4096, 65536, 1<<20 + 1} {
		data := randomBytes(n)
		r := b.ctrWith(bytes.NewReader(data), b.execArgs(podID, nil, []string{"sha256sum"})...)
		b.want(r, 0, fmt.Sprintf("%x  -\n", sha256.Sum256(data)))
	}
}

// testEcho: both directions at the same time.
func testEcho(b *box) {
	data := randomBytes(8 << 20)
	r := b.ctrWith(bytes.NewReader(data), b.execArgs(podID, nil, []string{"cat"})...)
	if r.Code != 0 || r.Stdout != string(data) {
		b.Errorf("status %d, %d of %d bytes came back, equal %v; stderr %s", r.Code, len(r.Stdout), len(data), r.Stdout == string(data), r.Stderr)
	}
}

// testManyExecs: several at once, each with its own output.
func testManyExecs(b *box) {
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			b.want(b.exec(podID, "sh", "-c", fmt.Sprintf("echo %d; exit %d", i, i)), i, fmt.Sprintf("%d\n", i))
		})
	}
	wg.Wait()
}

// testExecUser: ctr resolves the user in the container's own files.
func testExecUser(b *box) {
	r := b.ctr(b.execArgs(podID, []string{"--user", "1000:1000"}, []string{"id", "-u"})...)
	b.want(r, 0, "1000\n")
}

// testMissingExecutable: the error names the program, and nothing stays.
func testMissingExecutable(b *box) {
	r := b.exec(podID, "no-such-program", "x")
	if r.Code == 0 || !strings.Contains(r.Stderr, "no-such-program") {
		b.Errorf("exec: status %d, stderr %q; want the program named", r.Code, r.Stderr)
	}
	r = b.runSpec("missing", member(b.T, "/bin/also-missing"))
	if r.Code == 0 || !strings.Contains(r.Stderr, "also-missing") {
		b.Errorf("run: status %d, stderr %q; want the program named", r.Code, r.Stderr)
	}
	// The pod lives on.
	b.want(b.exec(podID, "echo", "alive"), 0, "alive\n")
}
