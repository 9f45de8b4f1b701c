// SPDX-License-Identifier: Apache-2.0

package inner

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/integration/lab"
	"github.com/kata-v2/kata/integration/lab/leak"
)

const runtimeName = "io.containerd.kata.v2"

// slow raises every limit that is meant for guests that are emulated only once.
var slow = map[string]string{
	"hypervisor.qemu.vsock":              `"vhost"`,
	"hypervisor.qemu.accelerator":        `"tcg"`,
	"hypervisor.qemu.default_memory":     "128",
	"agent.kata.dial_timeout":            "900",
	"agent.kata.launch_process_timeout":  "300",
	"runtime.create_container_timeout":   "900",
	"hypervisor.qemu.virtio_fs_cache":    `"always"`,
	"hypervisor.qemu.default_maxvcpus":   "1",
	"hypervisor.qemu.enable_annotations": "[]",
}

// slowContainerd does the same for containerd's own.
const slowContainerd = `
[timeouts]
  "io.containerd.timeout.shim.cleanup" = "120s"
  "io.containerd.timeout.shim.load" = "120s"
  "io.containerd.timeout.shim.shutdown" = "60s"
  "io.containerd.timeout.task.state" = "60s"
`

// box is a containerd with this shim.
type box struct {
	*testing.T
	c *lab.Containerd
}

func pods(t *testing.T) {
	leak.Check(t)
	ctx, cancel := context.WithTimeout(context.Background(), stepTimeout)
	defer cancel()
	c, err := lab.Start(ctx, lab.Options{
		Version: "2.4", ShimDir: BuildDir + "/bin", Kata: &lab.Kata{Images: BuildDir + "/images", Set: slow}, ExtraConfig: slowContainerd,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Stop(context.Background()); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("containerd and the shims:\n%s", strings.Join(c.Log()[max(0, len(c.Log())-60):], "\n"))
		}
	}()
	if err := c.ImportBusybox(ctx); err != nil {
		t.Fatal(err)
	}
	t.Log("containerd 2.4 runs and has the image")
	box{t, c}.twoPods()
	left := append(processes(t, "qemu-system"), processes(t, "virtiofsd")...)
	if len(left) > 0 {
		t.Errorf("processes are left: %v", left)
	}
}

func (b box) ctr(args ...string) lab.Result {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), stepTimeout)
	defer cancel()
	r, err := b.c.Ctr(ctx, args...)
	if err != nil {
		b.Errorf("ctr %s: %v", strings.Join(args, " "), err)
	}
	return r
}

// mustCtr is ctr for calls that must succeed.
func (b box) mustCtr(args ...string) string {
	b.Helper()
	r := b.ctr(args...)
	if r.Code != 0 {
		b.Errorf("ctr %s: status %d, %s", strings.Join(args, " "), r.Code, r.Stderr)
	}
	return r.Stdout
}

// pod is one running pod's processes.
type pod struct {
	id        string
	shim, vmm int
	cid       uint32
}

// The pods of the test, each one container: one is detached and has a network,
// the other is a `ctr run --rm` whose input is open until it is to end.
const (
	detached, attached = "one", "two"
	script             = "echo out; echo err >&2; uname -r; cat; exit 7"
)

func (b box) twoPods() {
	begin := time.Now()
	ns := wired(b.T)
	fg := b.foreground(b.c.RunArgs(runtimeName, attached, []string{"--rm"}, "sh", "-c", script)...)
	b.mustCtr(b.c.RunArgs(runtimeName, detached, []string{"--detach", "--with-ns", "network:" + ns.Path}, "sleep", "1000000")...)
	b.started(attached)
	if b.Failed() {
		return
	}
	b.Logf("two pods run after %v", time.Since(begin).Round(time.Millisecond))
	one, two := b.pod(detached), b.pod(attached)
	if one.cid == two.cid {
		b.Errorf("both guests have the context id %d", one.cid)
	}
	b.noUserVsock()
	b.cgroups(one, two)
	var wg sync.WaitGroup
	for _, p := range []pod{one, two} {
		wg.Go(func() { b.exec(p.id) })
	}
	wg.Wait()
	b.metrics(one, two)
	b.network(one)
	b.killShim(one)
	if out := b.mustCtr(b.execArgs(two.id, "after", "echo", "still here")...); out != "still here\n" {
		b.Errorf("the other pod after the kill: %q", out)
	}
	fg.end()
	for _, p := range []pod{one, two} {
		if err := claim(b.T, p.cid); err != nil {
			b.Errorf("context id %d of the removed pod %s: %v", p.cid, p.id, err)
		}
	}
}

// foreground is a `ctr run` that ends with its input.
type foreground struct {
	b              box
	cmd            *exec.Cmd
	stdin          io.Closer
	stdout, stderr bytes.Buffer
}

func (b box) foreground(args ...string) *foreground {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*stepTimeout)
	b.Cleanup(cancel)
	f := &foreground{b: b, cmd: b.c.CtrCmd(ctx, args...)}
	var err error
	if f.stdin, err = f.cmd.StdinPipe(); err != nil {
		b.Fatal(err)
	}
	f.cmd.Stdout, f.cmd.Stderr = &f.stdout, &f.stderr
	if err := f.cmd.Start(); err != nil {
		b.Fatal(err)
	}
	return f
}

// end closes the input and checks what came of it.
func (f *foreground) end() {
	f.b.Helper()
	begin := time.Now()
	_ = f.stdin.Close()
	err := f.cmd.Wait()
	code, out, errOut := f.cmd.ProcessState.ExitCode(), f.stdout.String(), f.stderr.String()
	f.b.Logf("ctr run --rm: status %d, output %q and %q, %v after its input ended", code, out, errOut, time.Since(begin).Round(time.Millisecond))
	if code != 7 || !strings.HasPrefix(out, "out\n") || errOut != "err\n" {
		f.b.Errorf("status %d (%v), output %q and %q; want 7, out, err", code, err, out, errOut)
	}
}

// started waits until the shim has logged a container's start, and shows its parts.
func (b box) started(id string) {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), stepTimeout)
	defer cancel()
	line, err := b.c.WaitLog(ctx, func(l string) bool { return lab.Started(l) && strings.Contains(l, "container="+id+" ") })
	if err != nil {
		b.Error(err)
		return
	}
	phases, err := lab.Phases(line)
	if err != nil {
		b.Error(err)
	}
	b.Logf("start of %s by phase: %v", id, phases)
}

// pod finds what a running pod has on the host, and checks that its vsock is the kernel's.
func (b box) pod(id string) pod {
	b.Helper()
	p := pod{id: id}
	for _, q := range processes(b.T, "qemu-system") {
		if !q.has("sandbox-" + id + ",") {
			continue
		}
		p.vmm = q.pid
		for _, a := range q.args {
			if _, after, ok := strings.Cut(a, "vhost-vsock-pci,guest-cid="); ok {
				n, _, _ := strings.Cut(after, ",")
				cid, err := strconv.ParseUint(n, 10, 32)
				if err != nil {
					b.Fatal(err)
				}
				p.cid = uint32(cid)
			}
		}
		if q.has("vhost-user-vsock") {
			b.Errorf("pod %s has a vhost-user vsock: %v", id, q.args)
		}
	}
	for _, s := range processes(b.T, "containerd-shim-kata") {
		if slices.Contains(s.args, id) {
			p.shim = s.pid
		}
	}
	if p.vmm == 0 || p.shim == 0 || p.cid == 0 {
		b.Fatalf("pod %s: %+v; want shim, QEMU and context id", id, p)
	}
	b.Logf("pod %s: shim %d, QEMU %d with vhost-vsock-pci and context id %d", id, p.shim, p.vmm, p.cid)
	if err := claim(b.T, p.cid); !errors.Is(err, unix.EADDRINUSE) {
		b.Errorf("context id %d of pod %s: %v; want EADDRINUSE", p.cid, id, err)
	}
	return p
}

// noUserVsock: the socket of the vhost-user device is in no pod's directory.
func (b box) noUserVsock() {
	b.Helper()
	err := filepath.WalkDir(b.c.PodsDir(), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == "vsock.sock" {
			b.Errorf("%s exists", path)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	if err != nil {
		b.Error(err)
	}
}

// cgroups shows where the processes of the pods are in the unified hierarchy.
func (b box) cgroups(pods ...pod) {
	for _, p := range pods {
		for name, pid := range map[string]int{"shim": p.shim, "QEMU": p.vmm} {
			data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
			group := string(bytes.TrimPrefix(bytes.TrimSpace(data), []byte("0::")))
			if err != nil || !strings.HasSuffix(group, "/kata_"+p.id) {
				b.Errorf("cgroup of the %s of pod %s: %q, %v; want the pod's in the unified hierarchy", name, p.id, data, err)
			}
			// Handed down from the root: the machine is counted, and a limit would hold.
			if _, err := os.Stat(filepath.Join("/sys/fs/cgroup", group, "memory.events")); err != nil {
				b.Error(err)
			}
			b.Logf("pod %s: the %s is in cgroup %s", p.id, name, bytes.TrimSpace(data))
		}
	}
}

// metrics: containerd gets the container's figures, in the form of cgroup v2.
func (b box) metrics(pods ...pod) {
	for _, p := range pods {
		out := b.mustCtr("tasks", "metrics", p.id)
		if !strings.Contains(out, "memory.usage ") || !strings.Contains(out, "cpu.usage_usec ") {
			b.Errorf("metrics of %s: %q", p.id, out)
		}
		_, values, _ := strings.Cut(out, "VALUE")
		b.Logf("pod %s: metrics %s", p.id, strings.Join(strings.Fields(values), " "))
	}
}

func (b box) execArgs(id, name string, args ...string) []string {
	return append([]string{"tasks", "exec", "--exec-id", name, "--fifo-dir", b.c.FIFODir(), id}, args...)
}

// exec: output, exit code, and bulk data in both directions.
func (b box) exec(id string) {
	begin := time.Now()
	if r := b.ctr(b.execArgs(id, "code", "sh", "-c", "echo $((6*7)); exit 3")...); r.Code != 3 || r.Stdout != "42\n" {
		b.Errorf("exec in %s: %+v; want 42 and status 3", id, r)
	}
	b.Logf("pod %s: exec with output and status took %v", id, time.Since(begin).Round(time.Millisecond))

	const size = 1<<20 + 12345
	data := bytes.Repeat([]byte(id+" 0123456789abcdef\n"), size/20)
	sum := sha256.Sum256(data)
	want := hex.EncodeToString(sum[:])
	ctx, cancel := context.WithTimeout(context.Background(), stepTimeout)
	defer cancel()
	begin = time.Now()
	cmd := b.c.CtrCmd(ctx, b.execArgs(id, "in", "sh", "-c", "tee /dev/stderr | sha256sum")...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(data), &stdout, &stderr
	err := cmd.Run()
	if err != nil || !strings.HasPrefix(stdout.String(), want) {
		b.Errorf("pod %s: stdin: %v, digest in the guest %q; want %s", id, err, stdout.String(), want)
	}
	if !bytes.Equal(stderr.Bytes(), data) {
		b.Errorf("pod %s: %d bytes came back of %d, or other ones", id, stderr.Len(), len(data))
	}
	b.Logf("pod %s: %d bytes went in and came back in %v, SHA-256 %s… on both sides", id, len(data), time.Since(begin).Round(time.Millisecond), want[:12])
}

// killShim: with the shim everything that it has made goes, and delete takes the rest.
func (b box) killShim(p pod) {
	if err := unix.Kill(p.shim, unix.SIGKILL); err != nil {
		b.Fatal(err)
	}
	begin := time.Now()
	for _, pid := range []int{p.shim, p.vmm} {
		b.gone(pid)
	}
	b.Logf("shim %d was killed; QEMU %d is gone after %v", p.shim, p.vmm, time.Since(begin).Round(time.Millisecond))
	// The last file of the device is closed in the course of QEMU's end.
	if err := claim(b.T, p.cid); err != nil {
		b.Errorf("context id %d of the killed pod: %v", p.cid, err)
	}
	b.ctr("tasks", "rm", "--force", p.id)
	b.mustCtr("containers", "rm", p.id)
	if _, err := os.Stat(filepath.Join(b.c.PodsDir(), p.id)); !errors.Is(err, fs.ErrNotExist) {
		b.Errorf("directory of the removed pod: %v", err)
	}
	if vmms := processes(b.T, "qemu-system"); len(vmms) != 1 {
		b.Errorf("%v run; want QEMU of the other pod only", vmms)
	}
	b.Logf("pod %s removed; context id %d is free", p.id, p.cid)
}

// gone waits for a process's end.
func (b box) gone(pid int) {
	b.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return
	}
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(fd)
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(stepTimeout/time.Millisecond))
	if n != 1 {
		b.Errorf("process %d lives (%v)", pid, err)
	}
}
