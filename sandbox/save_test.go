// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/kata-v2/kata/protocols/typespb"
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
