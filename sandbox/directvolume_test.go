// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/internal/directvolume"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/protocols/typespb"
)

// directPod is a pod with a register of direct-assigned volumes and a disk image.
func directPod(t *testing.T) (p *pod, register, image string) {
	t.Helper()
	p = newPod(t)
	register, image = filepath.Join(t.TempDir(), "register"), filepath.Join(t.TempDir(), "image")
	must(t, os.WriteFile(image, make([]byte, 4096), 0o600))
	p.o.DirectVolumes = register
	return p, register, image
}

func TestDirectVolume(t *testing.T) {
	p, register, image := directPod(t)
	volume := t.TempDir()
	info := &directvolume.MountInfo{VolumeType: directvolume.TypeBlock, Device: image, FSType: "xfs", Options: []string{"noatime"},
		Metadata: map[string]string{directvolume.KeyFSGroup: "7", directvolume.KeyFSGroupPolicy: directvolume.PolicyOnRootMismatch}}
	must(t, directvolume.Add(register, volume, info))
	create := func(id string) *Container {
		t.Helper()
		cc := p.container(id, "sleep")
		cc.Spec.Mounts = []specs.Mount{bindOf(volume, "/data", "rw")}
		c, err := p.CreateContainer(bounded(t), cc)
		must(t, err)
		return c
	}
	one := create("c1")
	at := p.sources()["/data"]
	req := p.agent.Request("CreateContainer").(*agentpb.CreateContainerRequest)
	if len(req.Storages) != 1 || at != protocols.GuestSandboxDir+"/storage/"+directvolume.Name(volume) {
		t.Fatalf("%v at %s", req.Storages, at)
	}
	st := req.Storages[0]
	if st.Driver != "blk" || st.Fstype != "xfs" || st.MountPoint != at || strings.Join(st.Options, ",") != "noatime" || st.Source == "" ||
		st.FsGroup.GetGroupId() != 7 || st.FsGroup.GetGroupChangePolicy() != typespb.FSGroupChangePolicy_OnRootMismatch {
		t.Errorf("%v", st)
	}
	two := create("c2")
	if again := p.agent.Request("CreateContainer").(*agentpb.CreateContainerRequest).Storages[0].Source; again != st.Source {
		t.Errorf("the second container's disk is at %s, the first one's at %s", again, st.Source)
	}
	users := func() int {
		t.Helper()
		u, err := directvolume.Users(register, volume)
		must(t, err)
		return len(u)
	}
	for i, c := range []*Container{one, two} {
		if users() != 1 {
			t.Errorf("%d pods use the volume before the end of container %d", users(), i)
		}
		must(t, c.Delete(bounded(t)))
	}
	if users() != 0 {
		t.Error("the pod is noted still")
	}
}

func TestBadDirectVolume(t *testing.T) {
	for name, c := range map[string]struct {
		device string
		want   func(error) bool
	}{
		"missing":   {"/nonexistent/device", errdefs.IsNotFound},
		"directory": {"/", errdefs.IsInvalidArgument},
		"character": {"/dev/null", errdefs.IsInvalidArgument},
	} {
		p, register, _ := directPod(t)
		volume := t.TempDir()
		must(t, directvolume.Add(register, volume, &directvolume.MountInfo{VolumeType: directvolume.TypeBlock, Device: c.device, FSType: "ext4"}))
		keep := p.start("keep", "sleep")
		cc := p.container("c1", "sleep")
		cc.Spec.Mounts = []specs.Mount{bindOf(volume, "/data", "rw")}
		_, err := p.CreateContainer(bounded(t), cc)
		if !c.want(err) || !strings.Contains(err.Error(), "mounts[0] (/data)") || !strings.Contains(err.Error(), c.device) {
			t.Errorf("%s: %v", name, err)
		}
		if users, err := directvolume.Users(register, volume); err != nil || len(users) > 0 || p.disks.Attached() > 0 {
			t.Errorf("%s: left: users %v, %v, disks %d", name, users, err, p.disks.Attached())
		}
		if keep.Init().State() != Running {
			t.Errorf("%s: the pod's other container is %s", name, keep.Init().State())
		}
	}
}

func TestVolumeThatNobodyHas(t *testing.T) {
	p, _, _ := directPod(t)
	p.start("c1", "sleep")
	if _, err := p.VolumeStats(bounded(t), "/data"); !errdefs.IsNotFound(err) {
		t.Errorf("stats: %v", err)
	}
	if err := p.ResizeVolume(bounded(t), "/data", 4096); !errdefs.IsNotFound(err) {
		t.Errorf("resize: %v", err)
	}
}
