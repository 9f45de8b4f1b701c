// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	internalapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	criclient "k8s.io/cri-client/pkg"

	"github.com/kata-v2/kata/integration/lab"
)

// criPod is a pod of the CRI, with a directory for each thing that kubelet would make.
type criPod struct {
	*box
	runtime internalapi.RuntimeService
	handler string
	dir     string // of the logs
	id, ip  string
	config  *runtimeapi.PodSandboxConfig
	all     map[string]string // id by name
}

// client connects to the lab's CRI.
func (b *box) client() internalapi.RuntimeService {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	b.must(b.c.ImportCRI(ctx))
	r, err := criclient.NewRemoteRuntimeServiceBuilder().
		WithEndpoint(b.c.Endpoint()).WithConnectionTimeout(callTimeout).WithTracerProvider(nil).Build(ctx)
	b.must(err)
	b.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
		defer cancel()
		b.must(r.Close(ctx))
	})
	return r
}

// context bounds a call; it ends with the test.
func (b *box) context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	b.Cleanup(cancel)
	return ctx
}

// runPod runs a pod of that name, from a checkpoint unless that is empty.
func (b *box) runPod(r internalapi.RuntimeService, handler, name, from string) *criPod {
	b.Helper()
	p := &criPod{box: b, runtime: r, handler: handler, dir: b.TempDir(), all: map[string]string{}}
	p.config = &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Uid: name + from, Namespace: "default"},
		Hostname: name, LogDirectory: p.dir, Annotations: map[string]string{},
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
		}},
	}
	if from != "" {
		p.config.Annotations["io.katacontainers.config.runtime.restore"] = from
	}
	var err error
	p.id, err = r.RunPodSandbox(b.context(), p.config, handler)
	b.must(err)
	b.Cleanup(p.remove)
	status, err := r.PodSandboxStatus(b.context(), p.id, false)
	b.must(err)
	p.ip = status.GetStatus().GetNetwork().GetIp()
	return p
}

// remove removes the pod, which may be gone.
func (p *criPod) remove() {
	p.Helper()
	have, err := p.runtime.ListPodSandbox(p.context(), &runtimeapi.PodSandboxFilter{Id: p.id})
	p.must(err)
	if len(have) > 0 {
		p.must(p.runtime.StopPodSandbox(p.context(), p.id))
		p.must(p.runtime.RemovePodSandbox(p.context(), p.id))
	}
}

// start makes and starts a container, with a file that kubelet keeps for its last
// words and a volume that is synced.
func (p *criPod) start(name, script string) {
	p.Helper()
	kubelet := filepath.Join(p.dir, "pods", "uid")
	words := filepath.Join(kubelet, "containers", name, "words")
	volume := filepath.Join(kubelet, "volumes", "kubernetes.io~configmap", "settings")
	for path, text := range map[string]string{words: "", filepath.Join(volume, "..1", "key"): p.config.Annotations["volume"]} {
		p.must(os.MkdirAll(filepath.Dir(path), 0o755))
		p.must(os.WriteFile(path, []byte(text), 0o644))
	}
	for link, to := range map[string]string{"..data": "..1", "key": "..data/key"} {
		if err := os.Symlink(to, filepath.Join(volume, link)); err != nil && !os.IsExist(err) {
			p.Fatal(err)
		}
	}
	config := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: lab.BusyboxImage},
		Command:  []string{"sh", "-c", script}, LogPath: name + ".log",
		Mounts: []*runtimeapi.Mount{
			{ContainerPath: "/dev/termination-log", HostPath: words},
			{ContainerPath: "/settings", HostPath: volume, Readonly: true},
		},
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
		}},
	}
	id, err := p.runtime.CreateContainer(p.context(), p.id, config, p.config)
	p.must(err)
	p.all[name] = id
	p.must(p.runtime.StartContainer(p.context(), id))
}

// shellIn runs a script in a container; it must succeed.
func (p *criPod) shellIn(name, script string) string {
	p.Helper()
	out, errOut, err := p.runtime.ExecSync(p.context(), p.all[name], []string{"sh", "-c", script}, callTimeout)
	if err != nil {
		p.Fatalf("%s: %s: %v: %s", name, script, err, errOut)
	}
	return strings.TrimSpace(string(out))
}

// numbers waits for n lines of a container's log, which count, and returns them.
func (p *criPod) numbers(name string, n int) (all []int) {
	p.Helper()
	deadline := time.Now().Add(callTimeout)
	for ; ; time.Sleep(50 * time.Millisecond) {
		all = nil
		data, err := os.ReadFile(filepath.Join(p.dir, name+".log"))
		if err != nil && !os.IsNotExist(err) {
			p.Fatal(err)
		}
		for line := range strings.Lines(string(data)) {
			// time stream F text (k8s.io/cri-api, container log format)
			f := strings.Fields(line)
			if !strings.HasSuffix(line, "\n") || len(f) < 4 {
				break
			}
			i, err := strconv.Atoi(f[3])
			p.must(err)
			if len(all) > 0 && i != all[len(all)-1]+1 {
				p.Fatalf("%s: %d follows %d", name, i, all[len(all)-1])
			}
			all = append(all, i)
		}
		if len(all) >= n {
			return all
		}
		if time.Now().After(deadline) {
			p.Fatalf("%s has counted %v", name, all)
		}
	}
}

// dial connects to the pod from the network that the lab takes for the host's.
func (p *criPod) dial() net.Conn {
	p.Helper()
	a, err := net.ResolveTCPAddr("tcp", p.ip+":7001")
	p.must(err)
	var c *net.TCPConn
	p.must(p.c.InHostNet(func() (err error) {
		c, err = net.DialTCP("tcp", nil, a) // of several addresses some would be dialled on other threads
		return err
	}))
	p.Cleanup(func() { c.Close() })
	return c
}

// TestPodCheckpoint: a pod of two containers goes on in a new pod, which has new
// ids, addresses and host paths: counters without a gap, a TCP listener, open
// files, what was written. Volumes are the new pod's.
func TestPodCheckpoint(t *testing.T) {
	b := openBox(t, "savable", savable())
	b.podGoesOn(b.client(), lab.HandlerSandbox)
}

// podGoesOn is the test for pods of one handler.
func (b *box) podGoesOn(r internalapi.RuntimeService, handler string) {
	t, dir := b.T, filepath.Join(b.TempDir(), "c")
	const side = `exec 5>/gone; rm /gone; echo last words >/dev/termination-log
	i=0; while :; do i=$((i+1)); echo $i >&5; echo $i; sleep 0.1; done`

	old := b.runPod(r, handler, "one", "")
	old.config.Annotations["volume"] = "old"
	old.start("web", worker)
	old.start("side", side)
	old.numbers("web", 3)
	echo(t, old.dial(), "before")
	disks := old.shellIn("side", listDisks)
	b.kataCtl("checkpoint", "--end", old.id, dir)
	last := map[string]int{}
	for _, name := range []string{"web", "side"} {
		old.exited(name)
		all := old.numbers(name, 1)
		last[name] = all[len(all)-1]
	}
	old.remove()

	p := b.runPod(r, handler, "two", dir)
	p.config.Annotations["volume"] = "new"
	for _, name := range []string{"side", "web"} { // the order does not matter
		p.start(name, "echo it is not run")
		if all := p.numbers(name, 3); all[0] != last[name]+1 {
			t.Errorf("%s goes on with %d after %d", name, all[0], last[name])
		}
	}
	echo(t, p.dial(), "restored")
	want(t, "what was written to the disk", p.shellIn("web", "cat /kept"), "kept")
	for _, name := range []string{"web", "side"} {
		n := p.numbers(name, 1) // what is in the log was in the file before
		lines, err := strconv.Atoi(p.shellIn(name, "wc -l </proc/1/fd/5"))
		if err != nil || lines < n[len(n)-1] {
			t.Errorf("%s: the open file has %d lines, %v; the log had %v", name, lines, err, n[len(n)-1])
		}
		want(t, name+": a synced volume", p.shellIn(name, "cat /settings/key"), "new")
		want(t, name+": the pod's name in a synced file", p.shellIn(name, "cat /etc/hostname"), "two")
		p.shellIn(name, "echo written by the restored "+name+" >/own; sync")
		if n := b.snapshotsWith("written by the restored " + name + "\n"); n != 1 {
			t.Errorf("%s: what it wrote is in %d snapshots", name, n)
		}
	}
	p.start("third", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done") // a new one
	p.numbers("third", 2)
	if ids := p.shellIn("third", "cat /settings/key"); ids != "new" {
		t.Errorf("a container that is new in the pod reads %q", ids)
	}
	words := filepath.Join(p.dir, "pods", "uid", "containers", "side", "words")
	p.must(p.runtime.StopContainer(p.context(), p.all["side"], 0))
	if text, err := os.ReadFile(words); err != nil || string(text) != "last words\n" {
		t.Errorf("what was written before the checkpoint: %q, %v", text, err)
	}
	p.must(p.runtime.RemoveContainer(p.context(), p.all["side"]))
	// Each had a disk of its own to write to, besides one with the layers of both;
	// side's was the last. The new one has its own two.
	lines := strings.Split(disks, "\n")
	n := len(lines)
	want(t, "disks when a restored container has gone and a new one has come", p.shellIn("web", listDisks),
		strings.Join(append(lines[:n-1], fmt.Sprintf("disk%d 1", n), fmt.Sprintf("disk%d 0", n+1)), "\n"))
}

// snapshotsWith counts the ext4 files of the erofs snapshotter that hold a text.
func (b *box) snapshotsWith(text string) (n int) {
	b.Helper()
	all, err := b.c.UpperFiles()
	b.must(err)
	for _, path := range all {
		data, err := os.ReadFile(path)
		b.must(err)
		if bytes.Contains(data, []byte(text)) {
			n++
		}
	}
	return n
}

// exited waits for a container's end.
func (p *criPod) exited(name string) {
	p.Helper()
	deadline := time.Now().Add(callTimeout)
	for {
		s, err := p.runtime.ContainerStatus(p.context(), p.all[name], false)
		p.must(err)
		if s.Status.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			return
		}
		if time.Now().After(deadline) {
			p.Fatalf("%s does not end: %v", name, s)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// member is a container of a group of ctr's, with the counter that it writes.
type member struct {
	id string
	counter
}

// runMember runs a container of the group "pod", from a checkpoint unless that is empty.
func (b *box) runMember(m *member, from string) {
	b.Helper()
	flags := []string{"--detach", "--log-uri", "file://" + m.path, "--annotation", "io.containerd.runc.v2.group=pod"}
	if from != "" {
		flags = append(flags, "--annotation", "io.katacontainers.config.runtime.restore="+from)
	}
	b.ok(b.runArgs(lab.BusyboxImage, m.id, flags, "sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done")...)
}

// TestGroupCheckpoint: containers of a group are saved together and come back one
// by one; one that does not come back is in the next checkpoint as it was.
func TestGroupCheckpoint(t *testing.T) {
	b := openBox(t, "savable", savable())
	dir := t.TempDir()
	pod := &member{"pod", counter{b: b, path: filepath.Join(dir, "pod.out")}}
	side := &member{"side", counter{b: b, path: filepath.Join(dir, "side.out")}}
	b.Cleanup(func() { b.remove(side.id); b.remove(pod.id) })
	for _, m := range []*member{pod, side} {
		b.runMember(m, "")
		m.more(3)
	}
	if r := b.ctr("tasks", "checkpoint", "--image-path", filepath.Join(dir, "none"), "side"); r.Code == 0 || !strings.Contains(r.Stderr, "shares its machine with container pod") {
		t.Errorf("a checkpoint of one of two: %+v", r)
	}
	side.more(3) // it goes on
	first, second := filepath.Join(dir, "first"), filepath.Join(dir, "second")
	b.kataCtl("checkpoint", "--end", "pod", first)
	b.removeEnded("side", "pod")

	b.runMember(pod, first)
	pod.more(3)
	b.kataCtl("checkpoint", "--end", "pod", second)
	b.removeEnded("pod")
	b.must(os.RemoveAll(first))

	b.runMember(pod, second)
	pod.more(3)
	b.runMember(side, second)
	side.more(3)
	if os.Getenv(allEnv) != "" {
		b.podGoesOn(b.client(), lab.HandlerPause)
	}
}

// removeEnded removes containers whose tasks are about to end.
func (b *box) removeEnded(ids ...string) {
	b.Helper()
	for _, id := range ids {
		b.ended(id)
		b.remove(id)
	}
}
