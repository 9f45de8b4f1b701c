// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kata-v2/kata/integration/lab"
	"github.com/kata-v2/kata/integration/lab/leak"
)

const runtimeName = "io.containerd.kata.v2"

// callTimeout bounds one ctr call; a machine without KVM takes its time.
const callTimeout = 90 * time.Second

func TestMain(m *testing.M) {
	os.Exit(leak.Main(m, "storage", closeBoxes))
}

// box is a containerd with one snapshotter, and a test's view of it.
type box struct {
	*testing.T
	c *lab.Containerd
}

// boxes are those of the run by name: several tests share one.
var boxes = map[string]*lab.Containerd{}

func closeBoxes() error {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	var errs []error
	for _, c := range boxes {
		errs = append(errs, c.Stop(ctx))
	}
	return errors.Join(errs...)
}

// openBox starts the containerd of that name, or takes the one that runs.
func openBox(t *testing.T, name string, o lab.Options, images ...lab.Image) *box {
	t.Helper()
	build := os.Getenv("KATA_BUILD")
	if build == "" {
		t.Fatal("KATA_BUILD is not set: it names the directory with bin/ and images/; run by make")
	}
	if boxes[name] == nil {
		if o.Kata == nil {
			o.Kata = &lab.Kata{}
		}
		o.Kata.Images, o.ShimDir = filepath.Join(build, "images"), filepath.Join(build, "bin")
		ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
		defer cancel()
		c, err := lab.Start(ctx, o)
		if err != nil {
			t.Fatal(err)
		}
		boxes[name] = c
		if err := c.ImportBusybox(ctx); err != nil {
			t.Fatal(err)
		}
	}
	b := &box{t, boxes[name]}
	for _, img := range images {
		b.importImage(img)
	}
	logged := len(b.c.Log())
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		for _, line := range b.c.Log()[logged:] {
			if strings.Contains(line, "sandbox=") || strings.Contains(line, "level=error") {
				t.Log(line)
			}
		}
	})
	return b
}

func (b *box) importImage(img lab.Image) {
	b.Helper()
	path := filepath.Join(b.TempDir(), "image.tar")
	f, err := os.Create(path)
	b.must(err)
	b.must(errors.Join(img.Write(f), f.Close()))
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	b.must(b.c.Import(ctx, path))
}

func (b *box) must(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// ctr runs ctr to its end.
func (b *box) ctr(args ...string) lab.Result {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	r, err := b.c.Ctr(ctx, args...)
	b.must(err)
	return r
}

// ok is ctr for what must succeed; it returns the standard output without the
// white space around it.
func (b *box) ok(args ...string) string {
	b.Helper()
	r := b.ctr(args...)
	if r.Code != 0 {
		b.Fatalf("ctr %s: exit status %d: %s", strings.Join(args, " "), r.Code, r.Stderr)
	}
	return strings.TrimSpace(r.Stdout)
}

// run is `ctr run` of an image; flags come before it.
func (b *box) runArgs(image, id string, flags []string, args ...string) []string {
	all := append([]string{"run", "--snapshotter", b.c.Snapshotter(), "--fifo-dir", b.c.FIFODir(), "--runtime", runtimeName}, flags...)
	return append(append(all, image, id), args...)
}

// start runs a container in the background, which the test's end removes.
func (b *box) start(image, id string, flags ...string) {
	b.Helper()
	b.Cleanup(func() { b.remove(id) })
	b.ok(b.runArgs(image, id, append([]string{"--detach", "--null-io"}, flags...), "sleep", "1000000")...)
}

// remove removes a container with its task and snapshot, if it is there.
func (b *box) remove(id string) {
	for _, args := range [][]string{{"tasks", "rm", "--force", id}, {"containers", "rm", id}} {
		have := b.ok(args[0], "ls", "-q")
		if strings.Contains("\n"+have+"\n", "\n"+id+"\n") {
			b.ok(args...)
		}
	}
}

// shell runs a script in a running container; it must succeed.
func (b *box) shell(id, script string) string {
	b.Helper()
	return b.ok("tasks", "exec", "--exec-id", "x"+strconv.FormatInt(time.Now().UnixNano(), 36), "--fifo-dir", b.c.FIFODir(), id, "sh", "-c", script)
}

// log is the shim's line about a container's root filesystem.
func (b *box) rootLog(id string) string {
	b.Helper()
	for _, line := range b.c.Log() {
		if strings.Contains(line, `msg="root filesystem"`) && strings.Contains(line, "container="+id+" ") {
			return line
		}
	}
	b.Fatalf("no line about the root filesystem of %s", id)
	return ""
}

// processes are the command lines of the pod of a container: what descends from
// the shim that has it.
func (b *box) processes(id string) (list []string) {
	b.Helper()
	entries, err := os.ReadDir("/proc")
	b.must(err)
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		env, err := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		line, err2 := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err == nil && err2 == nil && (bytes.Contains(env, []byte(b.c.Root)) || bytes.Contains(line, []byte("sandbox-"+id+","))) || bytes.Contains(line, []byte(b.c.Root)) {
			list = append(list, strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	return list
}

const listDisks = "cd /sys/block; for d in vd*; do test ! -e $d || echo $(cat $d/serial) $(cat $d/ro); done | sort"

// disks asks the guest which disks it has: their serial numbers, and whether they
// are read-only. Which of two gets the first name depends on how fast each is.
func (b *box) disks(id string) string {
	b.Helper()
	return b.shell(id, listDisks)
}

func want(t *testing.T, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %q, want %q", what, got, want)
	}
}
