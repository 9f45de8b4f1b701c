// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"golang.org/x/sys/unix"
)

// deleteLimit is more than Delete may take when a stream is held open: five
// seconds without a byte (drainQuiet of the shim), and the call itself.
const deleteLimit = 10 * time.Second

// reader reads a pipe of the test step by step.
type reader struct {
	b *box
	f *os.File
}

// openReader opens a pipe as a client that has gone and come does: both ways, so
// that its end is never seen.
func (b *box) openReader(path string) reader {
	b.Helper()
	f := open(b.T, path, os.O_RDWR)
	if err := f.SetReadDeadline(time.Now().Add(callTimeout)); err != nil {
		b.Fatal(err)
	}
	return reader{b, f}
}

func (r reader) expect(want string) {
	r.b.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(r.f, got); err != nil || string(got) != want {
		r.b.Errorf("read %q, %v; want %q", got[:n], err, want)
	}
}

func (b *box) writeOnce(path, data string) {
	b.Helper()
	f := open(b.T, path, os.O_WRONLY)
	defer f.Close()
	if _, err := f.WriteString(data); err != nil {
		b.Error(err)
	}
}

// testClientsComeAndGo: readers and writers of the pipes come and go, and only
// CloseIO ends stdin.
func testClientsComeAndGo(b *box) {
	io := newPipes(b.T)
	x := b.dialShim(stdioPod).addExec(calls(b.T), stdioPod, process("cat"), io)
	for _, word := range []string{"one\n", "two\n", "three\n"} {
		b.writeOnce(io.stdin, word)
		r := b.openReader(io.stdout)
		r.expect(word)
		r.f.Close()
	}
	b.writeOnce(io.stdin, "last\n")
	r := b.openReader(io.stdout)
	x.closeStdin()
	x.end(0)
	r.expect("last\n")
}

// testAttach: `ctr tasks attach` detaches without ending the program's input,
// and attaches again.
func testAttach(b *box) {
	sp := newSpec(b.T, "sh", "-c", "while read a; do echo got $a; [ $a = end ] && exit 4; done; exit 5").group(stdioPod)
	b.Cleanup(func() { b.remove("attached") })
	b.ok("run", "--detach", "--fifo-dir", b.fifoDir(), "--runtime", runtimeName, "--config", sp.file(b.T), "attached")
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	first := b.c.CtrCmd(ctx, "tasks", "attach", "attached")
	in, err := first.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := first.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := first.Start(); err != nil {
		b.Fatal(err)
	}
	if _, err := io.WriteString(in, "hello\n"); err != nil {
		b.Error(err)
	}
	got := make([]byte, len("got hello\n"))
	if _, err := io.ReadFull(out, got); err != nil || string(got) != "got hello\n" {
		b.Errorf("attached: %q, %v", got, err)
	}
	if err := first.Process.Kill(); err != nil {
		b.Error(err)
	}
	_ = first.Wait() // it was killed
	r := b.ctrWith(strings.NewReader("end\n"), "tasks", "attach", "attached")
	if r.Code != 4 || r.Stdout != "got end\n" {
		b.Errorf("attached again: %+v", r)
	}
}

// testHalfClose: the end of the input is not the end of the output.
func testHalfClose(b *box) {
	io := newPipes(b.T)
	r := b.openReader(io.stdout)
	x := b.dialShim(stdioPod).addExec(calls(b.T), stdioPod, shell(false, "cat; echo end of input; read a; echo still $?"), io)
	b.writeOnce(io.stdin, "words\n")
	r.expect("words\n")
	x.closeStdin()
	r.expect("end of input\nstill 1\n")
	x.end(0)
}

// testInputNobodyReads: the client of a program that ends without reading its
// input is not stuck, and neither is Delete.
func testInputNobodyReads(b *box) {
	pipes := newPipes(b.T)
	x := b.dialShim(stdioPod).addExec(calls(b.T), stdioPod, shell(false, "sleep 0.2; exit 2"), pipes)
	w := open(b.T, pipes.stdin, os.O_WRONLY)
	if err := w.SetWriteDeadline(time.Now().Add(callTimeout)); err != nil {
		b.Fatal(err)
	}
	failed := make(chan error, 1)
	go func() {
		_, err := w.Write(make([]byte, 16<<20))
		failed <- err
	}()
	if got := x.wait(); got != 2 {
		b.Errorf("status %d", got)
	}
	x.delete()
	if err := receive(b.T, "the end of the writing", failed); err == nil || os.IsTimeout(err) {
		b.Errorf("16 MiB of input for nobody: %v; want a broken pipe", err)
	}
}

// rss is a process's resident memory in bytes, without what it shares with the guest.
func (b *box) rss(pid int) int {
	b.Helper()
	for line := range strings.Lines(readFile(b.T, fmt.Sprintf("/proc/%d/status", pid))) {
		var kb int
		if _, err := fmt.Sscanf(line, "RssAnon: %d kB", &kb); err == nil {
			return kb << 10
		}
	}
	b.Fatal("no RssAnon")
	return 0
}

// testSlowReader: a stream that nobody reads stops its writer and nothing else –
// not the other stream of the process, not another exec or container, not the
// exit –, and costs no memory to speak of.
func testSlowReader(b *box) {
	ctx, s := calls(b.T), b.dialShim(stdioPod)
	con, err := s.Connect(ctx, &task.ConnectRequest{ID: stdioPod})
	if err != nil {
		b.Fatal(err)
	}
	before := b.rss(int(con.ShimPid))
	const flood = "(dd if=/dev/zero bs=64k count=1600 2>/dev/null; echo passed >&2) & echo complaint >&2; wait; exit 7"
	var stuck []*proc
	for i := range 4 {
		io := newPipes(b.T)
		io.stdin = ""
		errs := b.openReader(io.stderr)
		if i == 0 {
			stuck = append(stuck, s.addInit(ctx, newSpec(b.T, "sh", "-c", flood).group(stdioPod), io))
		} else {
			stuck = append(stuck, s.addExec(ctx, stdioPod, shell(false, flood), io))
		}
		errs.expect("complaint\n")
	}
	// Beside them, as if they were not there.
	for _, id := range []string{stdioPod, stuck[0].id} {
		io := newPipes(b.T)
		io.stdin = ""
		out, errs := collect(b.T, io.stdout), collect(b.T, io.stderr)
		x := s.addExec(ctx, id, shell(false, "dd if=/dev/zero bs=64k count=64 2>/dev/null; echo ok >&2"), io)
		out.started()
		errs.started()
		x.end(0)
		if n, e := len(receive(b.T, "stdout", out.data)), string(receive(b.T, "stderr", errs.data)); n != 4<<20 || e != "ok\n" {
			b.Errorf("beside a stuck stream: %d bytes and %q", n, e)
		}
	}
	if grown := b.rss(int(con.ShimPid)) - before; grown > 16<<20 {
		b.Errorf("400 MiB that nobody reads cost the shim %d bytes", grown)
	}
	slices.Reverse(stuck) // the container with its exec last
	var wg sync.WaitGroup
	for _, x := range stuck {
		x.kill()
		began := time.Now()
		if got := x.wait(); got != 137 {
			b.Errorf("status %d, want 137", got)
		}
		if took := time.Since(began); took > endLimit {
			b.Errorf("the exit of a process with a stuck stream was told after %v", took)
		}
		wg.Go(func() {
			began := time.Now()
			x.delete()
			if took := time.Since(began); took > deleteLimit {
				b.Errorf("Delete took %v", took)
			}
		})
	}
	wg.Wait()
}

// testGrandchild: whoever inherits a stream delays neither the exit nor, beyond
// its bound, Delete; and what was written before the exit is there.
func testGrandchild(b *box) {
	ctx, s, seen := calls(b.T), b.dialShim(stdioPod), b.subscribe()
	io := newPipes(b.T)
	io.stdin = ""
	out := b.openReader(io.stdout)
	x := s.addExec(ctx, stdioPod, shell(false, "sleep 100000 & echo $!; exit 3"), io)
	if got := x.wait(); got != 3 {
		b.Errorf("status %d", got)
	}
	// The event comes before Delete is even called.
	seen.until(stdioPod, "/tasks/exit")
	pid := make([]byte, 16)
	n, err := out.f.Read(pid)
	if err != nil {
		b.Fatal(err)
	}
	began := time.Now()
	x.delete()
	if took := time.Since(began); took > deleteLimit {
		b.Errorf("Delete took %v", took)
	}
	// It was still there, so it is not its end that Delete waited for.
	b.want(b.exec(stdioPod, "kill", strings.TrimSpace(string(pid[:n]))), 0, "")
}

// hammerExecs run one after the other in each of hammerWorkers, within hammerLimit.
const (
	hammerExecs   = 120
	hammerWorkers = 2
	hammerLimit   = 3 * time.Minute
)

// testLastWords: what a process writes right before its end has arrived when
// Delete, called at once, returns; on both streams, time and again. dd counts on
// stderr as its last act.
func testLastWords(b *box) {
	ctx, cancel := context.WithTimeout(context.Background(), hammerLimit)
	defer cancel()
	s := b.dialShim(stdioPod)
	dir, data := b.TempDir(), randomBytes(200_000)
	writeFile(b.T, string(data), dir, "data")
	c := s.addInit(ctx, newSpec(b.T, "sleep", "100000").group(stdioPod).mount("bind", dir, "/in", "rbind", "ro"), pipes{})
	var wg sync.WaitGroup
	began := time.Now()
	for range hammerWorkers {
		wg.Go(func() {
			for i := range hammerExecs / hammerWorkers {
				b.lastWords(ctx, s, c.id, i, data)
			}
		})
	}
	wg.Wait()
	b.Logf("%d execs: %v", hammerExecs, time.Since(began).Round(time.Millisecond))
	c.kill()
	c.end(137)
}

// lastWords reads what is in the pipes, without waiting, once Delete has returned.
func (b *box) lastWords(ctx context.Context, s *shimClient, id string, i int, data []byte) {
	n := 1 + (i*7919)%len(data)
	io := newPipes(b.T)
	ends := [2]*os.File{open(b.T, io.stdout, os.O_RDWR), open(b.T, io.stderr, os.O_RDWR)}
	x := s.addExec(ctx, id, process("dd", "if=/in/data", fmt.Sprintf("bs=%d", n), "count=1"), pipes{stdout: io.stdout, stderr: io.stderr})
	x.end(0)
	// All of it fits into the pipes, which the shim has made wide enough.
	b.wantBytes("stdout", b.inPipe(ends[0], n+1), data[:n])
	b.wantBytes("stderr", b.inPipe(ends[1], 100), []byte("1+0 records in\n1+0 records out\n"))
	closeFiles(ends[:]...)
}

func closeFiles(files ...*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// inPipe takes what is in a pipe, at most n bytes.
func (b *box) inPipe(f *os.File, n int) []byte {
	b.Helper()
	rc, err := f.SyscallConn()
	if err != nil {
		b.Error(err)
		return nil
	}
	buf, have := make([]byte, n), 0
	if err := rc.Read(func(fd uintptr) bool {
		for have < n {
			k, err := unix.Read(int(fd), buf[have:])
			if err != nil || k == 0 { // EAGAIN: it is empty
				break
			}
			have += k
		}
		return true
	}); err != nil {
		b.Error(err)
	}
	return buf[:have]
}
