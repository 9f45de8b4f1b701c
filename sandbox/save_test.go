// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/protocols/typespb"
	"github.com/kata-v2/kata/sandbox/agentclient"
	"github.com/kata-v2/kata/sandbox/checkpoint"
	"github.com/kata-v2/kata/sandbox/storage"
)

// A pod that cannot be saved is refused with the reason, and nothing is written.
func TestCheckpointRefused(t *testing.T) {
	p := newPod(t)
	ctx := bounded(t)
	dir := filepath.Join(t.TempDir(), "c")
	is(t, "checkpoint before there is a machine", p.Checkpoint(ctx, dir, false), errdefs.IsFailedPrecondition)
	p.start("box", "sleep", "9")
	err := p.Checkpoint(ctx, dir, false)
	is(t, "checkpoint", err, errdefs.IsFailedPrecondition)
	if !strings.Contains(err.Error(), "runtime.enable_checkpoint") {
		t.Errorf("the reason is %v", err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("%s is there: %v", dir, err)
	}
	is(t, "the only container", p.StandsForPod("box"), func(err error) bool { return err == nil })
	p.start("pod", "sleep", "9")
	is(t, "the pod's own container", p.StandsForPod("pod"), func(err error) bool { return err == nil })
	is(t, "one of two", p.StandsForPod("box"), errdefs.IsFailedPrecondition)
	must(t, p.Stop(ctx))
	is(t, "checkpoint of a pod that has ended", p.Checkpoint(ctx, dir, false), errdefs.IsFailedPrecondition)
}

// A container is not restored into a pod that is not to be saved.
func TestRestoreRefused(t *testing.T) {
	p := newPod(t)
	cc := p.container("box", "true")
	cc.Checkpoint = "/nowhere"
	_, err := p.CreateContainer(bounded(t), cc)
	is(t, "restore", err, errdefs.IsFailedPrecondition)
	p.o.Config.Runtime.EnableCheckpoint = true
	_, err = p.CreateContainer(bounded(t), cc)
	is(t, "restore from nowhere", err, errdefs.IsNotFound)
	if !p.Idle() {
		t.Error("a container is left")
	}
}

// savedPod is a directory with a checkpoint of containers of these names, which can be
// read, though not loaded.
func savedPod(t *testing.T, names ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "c")
	w, err := checkpoint.Create(dir)
	must(t, err)
	f, err := w.State()
	must(t, err)
	f.Close()
	m := checkpoint.Manifest{Sandbox: "old", Synced: 5}
	memory, err := os.Create(filepath.Join(t.TempDir(), "memory"))
	must(t, err)
	defer memory.Close()
	m.Memory, err = w.Memory(memory)
	must(t, err)
	for _, name := range names {
		m.Containers = append(m.Containers, checkpoint.Container{Name: name, ID: "old-" + name, State: "running", Stdout: true})
	}
	must(t, w.Finish(m))
	return dir
}

// Containers of a restored pod find the saved ones by their names, each once.
func TestTakeover(t *testing.T) {
	dir := savedPod(t, "web", "side", pauseName)
	p := newPod(t, func(p *pod) { p.config.Runtime.EnableCheckpoint, p.config.Runtime.Restore = true, dir })
	must(t, p.Prepare(PodConfig{}, nil, nil))
	_, err := p.restorePod()
	must(t, err)
	of := func(id string, annotations ...string) (*takeover, error) {
		cc := p.container(id, "true")
		cc.Spec.Annotations = map[string]string{}
		for i := 0; i < len(annotations); i += 2 {
			cc.Spec.Annotations[annotations[i]] = annotations[i+1]
		}
		return p.takeoverOf(cc)
	}
	web, err := of("1", containerNameKey, "web")
	if must(t, err); web == nil || web.saved.ID != "old-web" || web.wants != (agentclient.StdioWants{Stdout: true}) {
		t.Fatalf("web goes on with %+v", web)
	}
	pause, err := of("2", containerTypeKey, "sandbox")
	if must(t, err); pause == nil || pause.saved.ID != "old-"+pauseName {
		t.Errorf("the pause container goes on with %+v", pause)
	}
	for _, id := range []string{"3", "web"} { // the name is taken
		if again, err := of(id, containerNameKey, "web"); err != nil || again != nil {
			t.Errorf("a second one of that name goes on with %+v, %v", again, err)
		}
	}
	if left := p.restore.waiting(); len(left) != 1 || left[0].Name != "side" {
		t.Errorf("waiting: %+v", left)
	}
	p.giveUp(web)
	if web, err = of("4", containerNameKey, "web"); err != nil || web == nil {
		t.Errorf("after a failure: %+v, %v", web, err)
	}
	cc := p.container("side", "true")
	cc.Spec.Process.Terminal = true
	_, err = p.takeoverOf(cc)
	is(t, "a terminal where there was none", err, errdefs.IsInvalidArgument)
	cc = p.container("other", "true")
	cc.Checkpoint = dir
	_, err = p.takeoverOf(cc)
	is(t, "a container that is not in it", err, errdefs.IsInvalidArgument)
	cc.Checkpoint = "/elsewhere"
	_, err = p.takeoverOf(cc)
	is(t, "another checkpoint", err, errdefs.IsFailedPrecondition)
}

// What a container brings must be what the saved one had.
func TestTakeoverFits(t *testing.T) {
	file := func(text string) *storage.Source {
		path := filepath.Join(t.TempDir(), "layer")
		must(t, os.WriteFile(path, []byte(text), 0o600))
		f, err := os.Open(path)
		must(t, err)
		t.Cleanup(func() { f.Close() })
		return &storage.Source{ReadOnly: true, Parts: []hypervisor.DiskPart{{File: f}}}
	}
	layer := file("layer")
	digest, err := digestOfPart(layer.Parts[0])
	must(t, err)
	r := &restore{c: &checkpoint.Checkpoint{}, parts: map[string][]os.FileInfo{}}
	r.c.Disks = []checkpoint.Disk{{ID: "disk1"}, {ID: "disk0", ReadOnly: true, Parts: []checkpoint.Part{{File: digest}}}}
	take := &takeover{restore: r, saved: checkpoint.Container{Name: "web", Disks: []string{"disk0", "disk1"}}}
	upper := &storage.Source{}
	must(t, take.fits([]*storage.Source{layer, upper}))
	must(t, take.fits([]*storage.Source{file("layer"), upper}))
	two := file("layer")
	two.Parts = append(two.Parts, two.Parts[0])
	for why, sources := range map[string][]*storage.Source{
		"had 2 disks and has 1": {layer}, "read-only was false and is true": {layer, layer},
		"part 0": {file("other"), upper}, "had 1 parts and has 2": {two, upper},
	} {
		if err := take.fits(sources); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), why) {
			t.Errorf("got %v; want %q", err, why)
		}
	}
	if got := duplicate([]string{"b", "a", "b"}); got != "b" || duplicate([]string{"a", "b"}) != "" || duplicate(nil) != "" {
		t.Errorf("duplicate: %q", got)
	}
}

// The network is the saved one when every message is.
func TestSameWire(t *testing.T) {
	a := &typespb.Interface{Name: "eth0", HwAddr: "02:00:00:00:00:01", Mtu: 1500,
		IPAddresses: []*typespb.IPAddress{{Address: "10.0.0.2", Mask: "24"}}}
	saved, err := wireJSON([]*typespb.Interface{a})
	must(t, err)
	moved := proto.Clone(a).(*typespb.Interface)
	moved.IPAddresses[0].Address = "10.0.0.3"
	for name, c := range map[string]struct {
		now  []*typespb.Interface
		want bool
	}{
		"same": {[]*typespb.Interface{a}, true}, "another address": {[]*typespb.Interface{moved}, false},
		"none": {nil, false}, "one more": {[]*typespb.Interface{a, a}, false},
	} {
		if got := sameWire(saved, c.now); got != c.want {
			t.Errorf("%s: %t", name, got)
		}
	}
}
