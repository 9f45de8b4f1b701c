// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kata-v2/kata/integration/lab"
)

// savable is a lab whose pods can be saved.
func savable() lab.Options {
	o := quota()
	o.Kata = &lab.Kata{Set: map[string]string{
		"runtime.enable_checkpoint": "true", "hypervisor.qemu.enable_annotations": `["restore"]`,
	}}
	return o
}

// worker counts on its output and in a file that has no name any more, and answers on a port.
const worker = `exec 5>/gone; rm /gone; echo kept >/kept
	nc -ll -p 7001 -e cat &
	i=0; while :; do i=$((i+1)); echo $i >&5; echo $i; sleep 0.1; done`

// TestCheckpoint: a pod goes on after it was saved, and goes on from there when it
// is restored: its counter, without a gap, its TCP connection and listener, its open
// file, what it wrote to its disk.
func TestCheckpoint(t *testing.T) {
	b := openBox(t, "savable", savable())
	dir := t.TempDir()
	pod, outside := lab.NewNetNS(t), lab.NewNetNS(t)
	pod.Veth("eth0", outside, "host0")
	pod.Addr("eth0", "10.79.0.2/24")
	outside.Addr("host0", "10.79.0.1/24")
	c := &counter{b: b, path: filepath.Join(dir, "out")}
	run := func(from string) lab.Result {
		var flags []string
		if from != "" {
			flags = append(flags, "--annotation", "io.katacontainers.config.runtime.restore="+from)
		}
		flags = append(flags, "--detach", "--log-uri", "file://"+c.path, "--with-ns", "network:"+pod.Path)
		return b.ctr(b.runArgs(lab.BusyboxImage, "saved", flags, "sh", "-c", worker)...)
	}
	b.Cleanup(func() { b.remove("saved") })
	begin := func(from string) {
		t.Helper()
		if r := run(from); r.Code != 0 {
			t.Fatalf("run from %q: %s", from, r.Stderr)
		}
	}
	begin("")
	c.more(5)
	conn := outside.Dial("10.79.0.2:7001")
	echo(t, conn, "before")

	first, second := filepath.Join(dir, "first"), filepath.Join(dir, "second")
	b.kataCtl("checkpoint", "saved", first)
	c.more(5)
	echo(t, conn, "it went on")
	b.kataCtl("checkpoint", "--end", "saved", second)
	b.ended("saved")
	b.remove("saved")

	b.must(os.Truncate(filepath.Join(first, "memory"), 4096))
	if r := run(first); r.Code == 0 || !strings.Contains(r.Stderr, "it is truncated") {
		t.Errorf("a checkpoint that is truncated: %+v", r)
	}
	b.remove("saved")

	if out := b.kataCtl("restore", second); !strings.Contains(out, "pod saved, saved ") || !strings.Contains(out, "is whole") {
		t.Errorf("kata-ctl restore: %s", out)
	}
	begin(second)
	c.more(5)
	echo(t, conn, "restored")
	echo(t, outside.Dial("10.79.0.2:7001"), "a new connection")
	lines, kept, _ := strings.Cut(b.shell("saved", "wc -l </proc/1/fd/5; cat /kept"), "\n")
	if n, err := strconv.Atoi(lines); err != nil || n < c.last {
		t.Errorf("the open file has %q lines, the output %d", lines, c.last)
	}
	want(t, "what was written to the disk", kept, "kept")
	b.ok("tasks", "kill", "--signal", "KILL", "saved")
	b.ended("saved")
}

// counter reads what the worker writes.
type counter struct {
	b    *box
	path string
	last int
}

// more waits for n more numbers, which follow each other.
func (c *counter) more(n int) {
	c.b.Helper()
	deadline := time.Now().Add(callTimeout)
	for until := c.last + n; c.last < until; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			c.b.Fatalf("no number after %d", c.last)
		}
		data, err := os.ReadFile(c.path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		c.b.must(err)
		for i, line := range strings.Split(strings.TrimSuffix(string(data), "\n"), "\n") {
			if line != strconv.Itoa(i+1) && line != "" {
				c.b.Fatalf("line %d of the output is %q", i+1, line)
			}
			c.last = i + 1
		}
	}
}

// echo has the pod repeat a line.
func echo(t *testing.T, c net.Conn, line string) {
	t.Helper()
	got := make([]byte, len(line))
	err := c.SetDeadline(time.Now().Add(callTimeout))
	if err == nil {
		_, err = io.WriteString(c, line)
	}
	if err == nil {
		_, err = io.ReadFull(c, got)
	}
	if err != nil || string(got) != line {
		t.Fatalf("echo of %q: %q, %v", line, got, err)
	}
}

// kataCtl runs kata-ctl, which must succeed.
func (b *box) kataCtl(args ...string) string {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	out, err := b.c.KataCtl(ctx, args...)
	if err != nil {
		b.Fatalf("kata-ctl %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return out
}

// ended waits for the end of a task.
func (b *box) ended(id string) {
	b.Helper()
	deadline := time.Now().Add(callTimeout)
	for !strings.Contains(b.ok("tasks", "ls"), "STOPPED") {
		if time.Now().After(deadline) {
			b.Fatalf("task %s goes on", id)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
