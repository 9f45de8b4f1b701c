// SPDX-License-Identifier: Apache-2.0

package cri

import (
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// testDiskUsage: what the kubelet adds up as a pod's ephemeral storage. What a
// container writes into its root is in the CRI's figures of its writable layer;
// what it writes into an emptyDir on disk is below the kubelet's own directory.
func testDiskUsage(p *pod) {
	scratch := filepath.Join(p.TempDir(), "pods", "uid", "volumes", "kubernetes.io~empty-dir", "scratch")
	p.ok(os.MkdirAll(scratch, 0o777))
	config := p.script("for f in 1 2 3; do : >/empty$f; done; head -c 33554432 /dev/zero >/root/file; head -c 8388608 /dev/zero >/scratch/file; sync; echo up; sleep 100000")
	config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/scratch", HostPath: scratch}}
	c := p.start(config)
	c.awaitLog("up\n")
	if n := allocated(p, scratch); n < 8*mib || n > 9*mib {
		p.Errorf("the kubelet finds %d bytes in the emptyDir; want 8 MiB", n)
	}
	// containerd asks its snapshotter now and then (stats_collect_period, 10 s).
	var layer *runtimeapi.FilesystemUsage
	for deadline := time.Now().Add(callTimeout); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		all := must(p.runtime.ListContainerStats(p.ctx(), &runtimeapi.ContainerStatsFilter{Id: c.id}))(p)
		if len(all) != 1 {
			p.Fatalf("figures of %d containers", len(all))
		}
		if layer = all[0].WritableLayer; layer.GetUsedBytes().GetValue() >= 32*mib {
			break
		}
	}
	if n := layer.GetUsedBytes().GetValue(); n < 32*mib || n > 33*mib {
		p.Errorf("%d bytes in the writable layer; want 32 MiB", n)
	}
	if n := layer.GetInodesUsed().GetValue(); n < 4 || n > 40 {
		p.Errorf("%d inodes in the writable layer; want those of four files and their directories", n)
	}
}

// allocated is how much the files of a directory take on the disk, in bytes.
func allocated(p *pod, dir string) (bytes int64) {
	p.Helper()
	p.ok(filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err == nil {
			bytes += st.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return err
	}))
	return bytes
}
