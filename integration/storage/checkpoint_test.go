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

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/integration/lab"
)

// savable is a lab whose pods can be saved.
func savable() lab.Options {
	o := quota()
	o.CRI = true
	o.Kata = &lab.Kata{Set: map[string]string{
		"runtime.enable_checkpoint": "true", "hypervisor.qemu.enable_annotations": `["restore"]`,
	}}
	return o
}

// worker counts on its output and in a file that has no name any more, and answers on a port.
const worker = `exec 5>/gone; rm /gone; echo kept >/kept
	nc -ll -p 7001 -e cat &
	until grep -q ':1B59 ' /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done # 7001 listens
	i=0; while :; do i=$((i+1)); echo $i >&5; echo $i; sleep 0.1; done`

// saved is a pod that is saved and restored, with its host's side.
type saved struct {
	*box
	dir          string
	pod, outside *lab.NetNS
	counter      *counter
}

func newSaved(t *testing.T) *saved {
	b := openBox(t, "savable", savable())
	s := &saved{box: b, dir: t.TempDir()}
	s.counter = &counter{b: b, path: filepath.Join(s.dir, "out")}
	s.pod, s.outside = wired(t)
	b.Cleanup(func() { b.remove("saved") })
	return s
}

// wired is a namespace for a pod, with the other end of its wire.
func wired(t *testing.T) (pod, outside *lab.NetNS) {
	pod, outside = lab.NewNetNS(t), lab.NewNetNS(t)
	pod.Veth("eth0", outside, "host0")
	pod.Addr("eth0", "10.79.0.2/24")
	outside.Addr("host0", "10.79.0.1/24")
	return pod, outside
}

// run runs the container, from a checkpoint unless that is empty.
func (s *saved) run(from, image, id string, pod *lab.NetNS) lab.Result {
	s.Helper()
	flags := []string{"--detach", "--log-uri", "file://" + s.counter.path, "--with-ns", "network:" + pod.Path}
	if from != "" {
		flags = append(flags, "--annotation", "io.katacontainers.config.runtime.restore="+from)
	}
	return s.ctr(s.runArgs(image, id, flags, "sh", "-c", worker)...)
}

// begin is run for what must succeed.
func (s *saved) begin(from string) {
	s.Helper()
	if r := s.run(from, lab.BusyboxImage, "saved", s.pod); r.Code != 0 {
		s.Fatalf("run from %q: %s", from, r.Stderr)
	}
}

// refused is run for what must fail, and leave nothing.
func (s *saved) refused(what string, r lab.Result, id, why string) {
	s.Helper()
	if r.Code == 0 || !strings.Contains(r.Stderr, why) {
		s.Errorf("%s: got %+v; want %q", what, r, why)
	}
	s.remove(id)
	if left := strings.Join(s.processes(id), "\n"); strings.Contains(left, "sandbox-"+id+",") {
		s.Errorf("%s: a machine is left: %s", what, left)
	}
}

// TestCheckpoint: a pod goes on after it was saved, and goes on from there when it
// is restored, again and again: its counter, without a gap, its TCP connection and
// listener, its open file, what it wrote to its disk.
func TestCheckpoint(t *testing.T) {
	b := newSaved(t)
	full := filepath.Join(b.dir, "full") // before the pod, whose shim has mounts of its own
	b.must(os.Mkdir(full, 0o700))
	b.must(unix.Mount("full", full, "tmpfs", 0, "size=4m,mode=0700"))
	b.Cleanup(func() { b.must(unix.Unmount(full, unix.MNT_DETACH)) })
	path := func(name string) string { return filepath.Join(b.dir, name) }

	b.begin("")
	b.counter.more(5)
	conn := b.outside.Dial("10.79.0.2:7001")
	echo(t, conn, "before")

	b.kataCtl("checkpoint", "saved", path("first"))
	b.counter.more(5)
	echo(t, conn, "it went on")
	if out, err := b.kataCtlErr("checkpoint", "saved", filepath.Join(full, "c")); err == nil || !strings.Contains(out, "no space left on device") {
		t.Errorf("to a file system that is full: %v: %s", err, out)
	}
	if left, err := os.ReadDir(full); err != nil || len(left) > 0 {
		t.Errorf("a checkpoint that failed left %v, %v", left, err)
	}
	b.counter.more(5)
	echo(t, conn, "after a failure")
	if out, err := b.kataCtlErr("checkpoint", "saved", path("first")); err == nil || !strings.Contains(out, "is not empty") {
		t.Errorf("to a directory that is in use: %v: %s", err, out)
	}

	// By the Task API; the pod ends.
	b.ok("tasks", "checkpoint", "--exit", "--image-path", path("second"), "saved")
	b.ended("saved")
	b.remove("saved")
	b.restoresRefused(path("first"), path("second"))
	if out := b.kataCtl("restore", path("second")); !strings.Contains(out, "pod saved, saved ") || !strings.Contains(out, "is whole") {
		t.Errorf("kata-ctl restore: %s", out)
	}

	b.begin(path("second"))
	b.counter.more(5)
	echo(t, conn, "restored")
	b.kataCtl("checkpoint", "--end", "saved", path("third"))
	b.ended("saved")
	b.remove("saved")

	b.begin(path("third"))
	b.counter.more(5)
	echo(t, conn, "restored again")
	echo(t, b.outside.Dial("10.79.0.2:7001"), "a new connection")
	lines, kept, _ := strings.Cut(b.shell("saved", "wc -l </proc/1/fd/5; cat /kept"), "\n")
	if n, err := strconv.Atoi(lines); err != nil || n < b.counter.last {
		t.Errorf("the open file has %q lines, the output %d", lines, b.counter.last)
	}
	want(t, "what was written to the disk", kept, "kept")
	if os.Getenv(allEnv) != "" {
		b.byImage()
	}
	b.ok("tasks", "kill", "--signal", "KILL", "saved")
	b.ended("saved")
}

// allEnv has tests do what takes long too; `make test-all` sets it.
const allEnv = "KATA_TEST_ALL"

// byImage: containerd packs a checkpoint into an image and hands it over by Create.
func (s *saved) byImage() {
	s.Helper()
	const ref = "example.com/checkpoint:latest"
	s.ok("containers", "checkpoint", "--image", "--task", "saved", ref)
	s.Cleanup(func() { s.ok("images", "rm", ref) })
	s.counter.more(5)
	s.ok("tasks", "kill", "--signal", "KILL", "saved")
	s.ended("saved")
	s.remove("saved")
	s.counter.last = 0
	s.ok("containers", "restore", "--live", "saved", ref)
	want(s.T, "a file of the restored one", s.shell("saved", "cat /kept"), "kept")
}

// restoresRefused: what does not fit a checkpoint is named; whole is one that is.
func (s *saved) restoresRefused(first, whole string) {
	s.Helper()
	other := onBusybox(s.T, layered("example.com/unlike:latest", 1))
	s.importImage(other)
	elsewhere := lab.NewNetNS(s.T)
	s.refused("no network", s.run(whole, lab.BusyboxImage, "saved", elsewhere), "saved", "checkpoint of another machine: network device 0 was")
	s.refused("another image", s.run(whole, other.Name, "saved", s.pod), "saved", "is not what the pod had: it needs the same image")
	s.refused("another id", s.run(whole, lab.BusyboxImage, "other", s.pod), "other", "is of pod saved with the containers saved: there is no other")
	s.refused("none", s.run(filepath.Join(s.dir, "none"), lab.BusyboxImage, "saved", s.pod), "saved", "no such file or directory")
	s.must(os.Truncate(filepath.Join(first, "memory"), 4096))
	s.refused("truncated", s.run(first, lab.BusyboxImage, "saved", s.pod), "saved", "it is truncated")
	s.must(os.Truncate(filepath.Join(first, "memory"), 256<<20))
	s.refused("damaged", s.run(first, lab.BusyboxImage, "saved", s.pod), "saved", "memory: it is not what was saved")
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

// kataCtlErr runs kata-ctl.
func (b *box) kataCtlErr(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	return b.c.KataCtl(ctx, args...)
}

// kataCtl runs kata-ctl, which must succeed.
func (b *box) kataCtl(args ...string) string {
	b.Helper()
	out, err := b.kataCtlErr(args...)
	if err != nil {
		b.Fatalf("kata-ctl %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return out
}

// ended waits for the end of a task.
func (b *box) ended(id string) {
	b.Helper()
	deadline := time.Now().Add(callTimeout)
	running := func() bool {
		for line := range strings.Lines(b.ok("tasks", "ls")) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == id {
				return f[2] != "STOPPED"
			}
		}
		return false
	}
	for running() {
		if time.Now().After(deadline) {
			b.Fatalf("task %s goes on", id)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
