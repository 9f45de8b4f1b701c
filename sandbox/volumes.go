// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox/storage"
)

// syncedPlugins are the volume plugins of Kubernetes that write small files and
// replace them all at once (kubelet, pkg/volume/*: the plugins' names in paths).
var syncedPlugins = []string{"kubernetes.io~configmap", "kubernetes.io~secret", "kubernetes.io~projected", "kubernetes.io~downward-api"}

// syncedTargets are files that an engine writes for a container, whatever their source.
var syncedTargets = []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}

// isSynced tells by source, destination and options whether a bind mount is one
// that the guest gets a copy of.
func isSynced(m specs.Mount) bool {
	return slices.Contains(syncedTargets, filepath.Clean(m.Destination)) || isTerminationLog(m.Source) ||
		readOnly(m.Options) && slices.Contains(syncedPlugins, volumePlugin(m.Source))
}

// isTerminationLog tells whether a path is the file into which a container of
// Kubernetes writes its last words: pods/<uid>/containers/<name>/<random> (kubelet,
// pkg/kubelet/kubelet_getters.go, GetPodContainerDir).
func isTerminationLog(source string) bool {
	parts := strings.Split(filepath.Clean(source), "/")
	n := len(parts)
	return n >= 6 && parts[n-3] == "containers" && parts[n-5] == "pods"
}

// volumePlugin is the volume plugin of Kubernetes that a path below kubelet's
// directory belongs to, "" for another path: pods/<uid>/volumes/<plugin>/<volume>.
func volumePlugin(source string) string {
	dir, _ := filepath.Split(filepath.Clean(source))
	dir, plugin := filepath.Split(filepath.Clean(dir))
	if !strings.Contains(plugin, "~") || filepath.Base(dir) != "volumes" {
		return ""
	}
	return plugin
}

// subPathOf is the volume that a subPath mount of Kubernetes shows a part of, ""
// for another source: kubelet binds the part at pods/<uid>/volume-subpaths/<volume>/<container>/<index>.
// plugins are where the volume may be.
func subPathOf(source string) (plugins, volume string) {
	parts := strings.Split(filepath.Clean(source), "/")
	n := len(parts)
	if n < 5 || parts[n-4] != "volume-subpaths" {
		return "", ""
	}
	return strings.Join(parts[:n-4], "/") + "/volumes", parts[n-3]
}

// isSyncedSubPath tells whether a mount is a file of a volume that is synced,
// which kubelet never updates.
func isSyncedSubPath(m specs.Mount) bool {
	dir, volume := subPathOf(m.Source)
	if volume == "" || !readOnly(m.Options) {
		return false
	}
	return slices.ContainsFunc(syncedPlugins, func(plugin string) bool {
		_, err := os.Lstat(filepath.Join(dir, plugin, volume))
		return err == nil
	})
}

// emptyDirPlugin is Kubernetes' plugin of volumes that live as long as their pod.
const emptyDirPlugin = "kubernetes.io~empty-dir"

// memoryVolume plans an emptyDir in memory, which is the guest's: kubelet has
// mounted a file system of the wanted kind and size on the host, which stays
// empty. The guest keeps it until the pod's end, so containers share it and find
// it again. It returns the place in the guest, "" for a volume that is on disk.
func (c *Container) memoryVolume(share *storage.Share, m specs.Mount) (string, error) {
	v, err := share.MemoryVolume(m.Source)
	if v == nil || err != nil {
		return "", err
	}
	st := &agentpb.Storage{
		Driver: "ephemeral", Source: "tmpfs", Fstype: "tmpfs", Shared: true,
		MountPoint: filepath.Join(protocols.GuestSandboxDir, "ephemeral", filepath.Base(m.Source)),
		Options:    []string{"nosuid", "nodev", fmt.Sprintf("mode=%o", v.Mode), fmt.Sprintf("uid=%d", v.UID), fmt.Sprintf("gid=%d", v.GID)},
	}
	size := v.Bytes
	if v.PageBytes > 0 {
		if size, err = hugepageLimit(c.spec, v.PageBytes); err != nil {
			return "", err
		}
		st.Source, st.Fstype = "hugetlbfs", "hugetlbfs"
		st.Options = append(st.Options, fmt.Sprintf("pagesize=%d", v.PageBytes))
	}
	if size > 0 {
		st.Options = append(st.Options, fmt.Sprintf("size=%d", size))
	}
	c.volumes = append(c.volumes, st)
	return st.MountPoint, nil
}

// hugepageLimit is the container's limit of huge pages of that size, in bytes:
// Kubernetes bounds them there, not in the volume.
func hugepageLimit(spec *specs.Spec, page uint64) (uint64, error) {
	name := fmt.Sprintf("%dKB", page>>10) // the form of runtime-spec config-linux.md, "Huge page limits"
	for shift, unit := range map[int]string{20: "MB", 30: "GB"} {
		if n := page >> shift; n > 0 && n < 1024 {
			name = fmt.Sprintf("%d%s", n, unit)
		}
	}
	if r := spec.Linux.Resources; r != nil {
		for _, l := range r.HugepageLimits {
			if l.Pagesize == name && l.Limit > 0 {
				return l.Limit, nil
			}
		}
	}
	return 0, fmt.Errorf("a volume of huge pages needs the container's limit of them (linux.resources.hugepageLimits, pageSize %s)", name)
}

// ownFileSystem plans a volume that the guest mounts or makes by itself; its place
// there is "" for any other.
func (c *Container) ownFileSystem(share *storage.Share, i int, m specs.Mount) (string, error) {
	if in, err := c.planDirect(i, m); in != "" || err != nil {
		return in, err
	}
	if volumePlugin(m.Source) == emptyDirPlugin {
		return c.memoryVolume(share, m)
	}
	return c.planMounted(share, i, m)
}

// syncVolumes finds the container's volumes that the guest gets copies of, and so
// what is left for the share. It comes before the machine, which may do without one.
func (c *Container) syncVolumes(share *storage.Share) error {
	c.sources = map[int]string{}
	for i, m := range c.spec.Mounts {
		plan := planMount(m)
		if plan == mountShared {
			in, err := c.ownFileSystem(share, i, m)
			if err != nil {
				return mountError(i, m, err)
			}
			if in != "" {
				c.sources[i] = in
				continue
			}
		}
		if plan == mountShared && isSyncedSubPath(m) {
			plan = mountSynced
		}
		if plan == mountSynced {
			was, err := c.savedCopy(m.Destination)
			var path string
			if err == nil {
				path, err = share.Sync(c.id, m.Source, !readOnly(m.Options), was)
			}
			if err == nil {
				c.sources[i], c.synced = path, append(c.synced, i)
				continue
			}
			if !errors.Is(err, storage.ErrNotSynced) {
				return mountError(i, m, err)
			}
			c.s.o.Log.Info("volume shared", "container", c.id, "destination", m.Destination, "reason", err)
			plan = mountShared
		}
		if plan == mountShared {
			c.shared = append(c.shared, i)
		}
	}
	return nil
}

// shareVolumes makes what is not synced appear in the share.
func (c *Container) shareVolumes(share *storage.Share) error {
	for _, i := range c.shared {
		m := c.spec.Mounts[i]
		how := bindOptions(m)
		if volumePlugin(m.Source) == emptyDirPlugin {
			how = storage.BindOptions{Recursive: true} // for all; the guest makes a read-only mount read-only
		}
		var err error
		if c.sources[i], err = share.BindPod(c.id, m.Source, how); err != nil {
			return mountError(i, m, err)
		}
	}
	return nil
}

func mountError(i int, m specs.Mount, err error) error {
	return fmt.Errorf("mounts[%d] (%s): %w: %w", i, m.Destination, err, errdefs.ErrInvalidArgument)
}

// pushVolumes copies the synced volumes into the guest. For one that knows no
// such volumes they are shared; spec, the guest's, names their new places then.
func (c *Container) pushVolumes(ctx context.Context, share *storage.Share, spec *specs.Spec) error {
	if len(c.synced) == 0 {
		return nil
	}
	m, err := c.s.running()
	if err != nil {
		return err
	}
	err = m.agent.Err(share.Push(ctx, c.id, m.agent.Files))
	if !errdefs.IsNotImplemented(err) {
		return err
	}
	share.Unsync(c.id)
	synced := c.synced
	c.synced, c.shared = nil, synced
	if err := c.shareVolumes(share); err != nil {
		return err
	}
	for _, i := range synced {
		spec.Mounts[i].Source = c.sources[i]
	}
	return nil
}

// collectTimeout bounds how long the exit of a container waits for what it has
// written into files that are synced.
const collectTimeout = 10 * time.Second

// collect brings what a container that has ended has written into synced files to
// the host, before anybody is told of its end: Kubernetes reads the termination
// message then.
func (c *Container) collect(m *machine) {
	share, err := c.s.share()
	if err != nil {
		return // then nothing is synced
	}
	ctx, cancel := context.WithTimeout(m.ctx, collectTimeout)
	defer cancel()
	if err := share.Collect(ctx, c.id); err != nil && !m.ending() {
		c.s.o.Log.Warn("what a container has written into a file may be missing on the host", "container", c.id, "error", m.agent.Err(err))
	}
}
