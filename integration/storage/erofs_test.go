// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/kata-v2/kata/integration/lab"
)

// plain is a lab whose containers write into the guest's memory.
func plain() lab.Options { return lab.Options{Snapshotter: "erofs"} }

// quota is a lab whose containers write to an ext4 of their own.
func quota() lab.Options {
	return lab.Options{Snapshotter: "erofs", EROFS: lab.EROFS{UpperSize: "16MiB"}}
}

// TestHundredLayers: a pod that shares nothing has one disk with all layers and no
// virtio-fs daemon; what is written stays in the guest's memory.
func TestHundredLayers(t *testing.T) {
	const layers = 100
	img := onBusybox(t, layered("example.com/hundred:latest", layers-1))
	b := openBox(t, "plain", plain(), img)
	b.start(img.Name, "hundred")
	want(t, "the topmost file, files of all layers, and one that is written",
		b.shell("hundred", "cat /top; echo; cat /layers/* | wc -c; echo x >/new; cat /new"), "99\n189\nx")
	want(t, "disks in the guest", b.disks("hundred"), "disk0 1")
	root, _, _ := strings.Cut(b.shell("hundred", "cat /proc/mounts"), "\n")
	if !strings.HasPrefix(root, "overlay / overlay rw,") || strings.Count(root, ":/run/l/") != layers-1 {
		t.Errorf("root: %s; want an overlay of %d layers", root, layers)
	}
	if line := b.rootLog("hundred"); !strings.Contains(line, "path=block") || !strings.Contains(line, "100 layers of type erofs, written in guest memory") {
		t.Errorf("logged: %s", line)
	}
	all := strings.Join(b.processes("hundred"), "\n")
	if strings.Contains(all, "virtiofsd") || strings.Contains(all, "vhost-user-fs") {
		t.Errorf("want no virtio-fs:\n%s", all)
	}
}

// TestQuotaAndHotPlug: what a container writes is bounded by its ext4; containers
// that come later get disks while the machine runs, share the layers of an image,
// and give back what nobody uses. One whose layer is bad gets none.
func TestQuotaAndHotPlug(t *testing.T) {
	other := onBusybox(t, layered("example.com/other:latest", 2))
	b := openBox(t, "quota", quota(), other)
	member := []string{"--annotation", "io.containerd.runc.v2.group=pod"} // the first one too: a pod of several
	b.start(lab.BusyboxImage, "pod", member...)
	const first = "disk0 1\ndisk1 0"
	want(t, "disks of the first container", b.disks("pod"), first)
	r := b.ctr("tasks", "exec", "--exec-id", "fill", "--fifo-dir", b.c.FIFODir(), "pod", "dd", "if=/dev/zero", "of=/fill", "bs=1M", "count=32")
	if r.Code == 0 || !strings.Contains(r.Stderr, "No space left on device") {
		t.Errorf("more than fits was written: %+v", r)
	}
	b.shell("pod", "rm /fill; echo x >/kept; sync")
	b.start(lab.BusyboxImage, "same", member...)
	want(t, "disks with one of the same image", b.disks("pod"), first+"\ndisk2 0")
	b.start(other.Name, "other", member...)
	want(t, "disks with one of another image", b.disks("pod"), first+"\ndisk2 0\ndisk3 1\ndisk4 0")
	want(t, "content", b.shell("other", "cat /layers/* /top; test -e /kept || echo apart"), "122apart")
	b.remove("other")
	b.remove("same")
	want(t, "disks when they are gone", b.disks("pod"), first)
	var wg sync.WaitGroup
	for i := range 3 {
		id := fmt.Sprintf("race%d", i)
		wg.Go(func() {
			r := b.ctr(b.runArgs(other.Name, id, append([]string{"--rm"}, member...), "cat", "/top")...)
			if r.Code != 0 || r.Stdout != "2" {
				t.Errorf("%s: %+v", id, r)
			}
		})
	}
	wg.Wait()
	b.refusesTruncated("example.com/bad-in-pod:latest", member...)
	want(t, "disks after three at once, and one whose layer is bad", b.disks("pod"), first)
	want(t, "what was written", b.shell("pod", "cat /kept"), "x")
}

// TestBadLayer: a layer that is truncated is named; no machine is started for it.
func TestBadLayer(t *testing.T) {
	b := openBox(t, "plain", plain())
	b.refusesTruncated("example.com/bad:latest")
	if left := b.processes("bad"); strings.Contains(strings.Join(left, "\n"), "sandbox-bad") {
		t.Errorf("a machine is left: %v", left)
	}
}

// refusesTruncated wants a container of an image with a truncated layer to be refused
// with the layer's name. Layers that are no EROFS at all containerd refuses itself.
func (b *box) refusesTruncated(image string, flags ...string) {
	b.Helper()
	img := onBusybox(b.T, layered(image, 1))
	before, err := b.c.LayerFiles()
	b.must(err)
	b.importImage(img)
	layer := newLayer(b.T, b, before, "layers")
	b.must(os.Truncate(layer, 4096))
	r := b.ctr(b.runArgs(img.Name, "bad", append([]string{"--rm"}, flags...), "true")...)
	if r.Code == 0 || !strings.Contains(r.Stderr, "rootfs layer 0 ("+layer+")") || !strings.Contains(r.Stderr, "it is truncated") {
		b.Errorf("got %+v; want an error that names the layer", r)
	}
	b.remove("bad")
}

// newLayer is the layer file that was not there before and holds the text.
func newLayer(t *testing.T, b *box, before []string, text string) string {
	t.Helper()
	now, err := b.c.LayerFiles()
	b.must(err)
	for _, path := range now {
		data, err := os.ReadFile(path)
		b.must(err)
		if !strings.Contains(strings.Join(before, "\n")+"\n", path+"\n") && strings.Contains(string(data), text) {
			return path
		}
	}
	t.Fatalf("no new layer holds %q: %v", text, now)
	return ""
}
