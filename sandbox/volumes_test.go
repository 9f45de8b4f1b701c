// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// volume makes a directory as kubelet writes one, with one file "key".
func volume(t *testing.T, dir, content string) string {
	t.Helper()
	must(t, os.MkdirAll(filepath.Join(dir, "..1"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "..1", "key"), []byte(content), 0o644))
	must(t, os.Symlink("..1", filepath.Join(dir, "..data")))
	must(t, os.Symlink("..data/key", filepath.Join(dir, "key")))
	return dir
}

func bindOf(source, destination string, options ...string) specs.Mount {
	return specs.Mount{Type: "bind", Source: source, Destination: destination, Options: append([]string{"rbind", "rprivate"}, options...)}
}

// sources of a container's bind mounts in the guest, by destination.
func (p *pod) sources() map[string]string {
	out := map[string]string{}
	for _, m := range p.agent.Request("CreateContainer").(*agentpb.CreateContainerRequest).OCI.Mounts {
		out[m.Destination] = m.Source
	}
	return out
}

func TestPlanVolumes(t *testing.T) {
	const base = "/var/lib/kubelet/pods/0b5e/volumes/"
	for _, c := range []struct {
		m    specs.Mount
		want mountPlan
	}{
		{bindOf(base+"kubernetes.io~configmap/config", "/config", "ro"), mountSynced},
		{bindOf(base+"kubernetes.io~secret/secret/", "/secret", "ro"), mountSynced},
		{bindOf(base+"kubernetes.io~projected/kube-api-access", "/token", "rro"), mountSynced},
		{bindOf(base+"kubernetes.io~downward-api/info", "/info", "ro"), mountSynced},
		{bindOf(base+"kubernetes.io~configmap/config", "/config", "rw"), mountShared},
		{bindOf(base+"kubernetes.io~configmap/config/key", "/config", "ro"), mountShared},
		{bindOf(base+"kubernetes.io~configmap", "/config", "ro"), mountShared},
		{bindOf(base+"kubernetes.io~empty-dir/scratch", "/scratch", "ro"), mountShared},
		{bindOf("/kubernetes.io~configmap/config", "/config", "ro"), mountShared},
		{bindOf("/run/containerd/sandboxes/x/resolv.conf", "/etc/resolv.conf", "ro"), mountSynced},
		{bindOf("/run/containerd/sandboxes/x/hosts", "/etc/../etc/hosts", "ro"), mountSynced},
		{bindOf("/run/containerd/sandboxes/x/hosts", "/etc/hosts", "rw"), mountSynced},
		{bindOf("/var/lib/kubelet/pods/0b5e/containers/main/1a2b3c4d", "/dev/termination-log"), mountSynced},
		{bindOf("/var/lib/kubelet/pods/0b5e/containers/main", "/x", "rw"), mountShared},
		{bindOf("/data/file", "/dev/termination-log", "rw"), mountShared},
		{bindOf("/data/passwd", "/etc/passwd", "ro"), mountShared},
	} {
		if got := planMount(c.m); got != c.want {
			t.Errorf("%+v: plan %d, want %d", c.m, got, c.want)
		}
	}
}

// A volume of Kubernetes and a subPath of it are copies in the guest, and follow
// the host's; what does not fit there goes through the share.
func TestSyncedVolumes(t *testing.T) {
	p := newPod(t)
	dir := filepath.Join(t.TempDir(), "pods", "uid")
	config := volume(t, filepath.Join(dir, "volumes/kubernetes.io~configmap/config"), "one")
	odd := filepath.Join(dir, "volumes/kubernetes.io~secret/odd")
	must(t, os.MkdirAll(odd, 0o755))
	sub := filepath.Join(dir, "volume-subpaths/config/ctr/0")
	must(t, os.MkdirAll(filepath.Dir(sub), 0o755))
	must(t, os.WriteFile(sub, []byte("part"), 0o644))
	foreign := filepath.Join(dir, "volume-subpaths/other/ctr/0")
	must(t, os.MkdirAll(filepath.Dir(foreign), 0o755))
	must(t, os.WriteFile(foreign, nil, 0o644))
	cc := p.container("c1", "sleep")
	cc.Spec.Mounts = []specs.Mount{bindOf(config, "/config", "ro"), bindOf(odd, "/odd", "ro"), bindOf(sub, "/sub", "ro"), bindOf(foreign, "/foreign", "ro")}
	c, err := p.CreateContainer(bounded(t), cc)
	must(t, err)
	at := p.sources()
	for dst, base := range map[string]string{
		"/config": protocols.GuestSyncedDir, "/sub": protocols.GuestSyncedDir, "/odd": protocols.GuestSharedDir, "/foreign": protocols.GuestSharedDir,
	} {
		if !strings.HasPrefix(at[dst], base+"/") {
			t.Errorf("%s is %s in the guest; want it below %s", dst, at[dst], base)
		}
	}
	name := func(guest string) string { return strings.TrimPrefix(guest, protocols.GuestSyncedDir+"/") }
	files, _ := p.agent.Files()
	if files[name(at["/config"])+"/..1/key"] != "one" || files[name(at["/sub"])] != "part" {
		t.Errorf("the guest has %q", files)
	}
	must(t, os.Mkdir(config+"/..2", 0o755))
	must(t, os.WriteFile(config+"/..2/key", []byte("two"), 0o644))
	must(t, os.Symlink("..2", config+"/..data_tmp"))
	must(t, os.Rename(config+"/..data_tmp", config+"/..data"))
	p.until("the update", func(files map[string]string) bool { return files[name(at["/config"])+"/..2/key"] == "two" })
	p.start("c2", "sleep") // keeps the machine, so the guest is cleaned up
	must(t, c.Init().Signal(bounded(t), 9, true))
	exit(t, c.Init())
	must(t, c.Delete(bounded(t)))
	p.until("the removal", func(files map[string]string) bool { return len(files) == 0 })
}

// until waits for a state of the guest's synced volumes.
func (p *pod) until(what string, ok func(map[string]string) bool) {
	p.t.Helper()
	timeout := time.After(limit)
	for {
		files, changed := p.agent.Files()
		if ok(files) {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			p.t.Fatalf("%s does not come; the guest has %q", what, files)
		}
	}
}

// What a container writes into its termination log is on the host when its exit
// is told; /etc/hosts follows both ways while it runs.
func TestWrittenFiles(t *testing.T) {
	p := newPod(t)
	dir := filepath.Join(t.TempDir(), "pods/uid")
	log, hosts := filepath.Join(dir, "containers/main/1a2b3c4d"), filepath.Join(dir, "etc-hosts")
	must(t, os.MkdirAll(filepath.Dir(log), 0o755))
	must(t, os.WriteFile(log, nil, 0o666))
	must(t, os.WriteFile(hosts, []byte("one"), 0o644))
	cc := p.container("c1", "sleep")
	cc.Spec.Mounts = []specs.Mount{bindOf(log, "/dev/termination-log", "rw"), bindOf(hosts, "/etc/hosts", "rw")}
	c, err := p.CreateContainer(bounded(t), cc)
	must(t, err)
	must(t, c.Start(bounded(t)))
	at := p.sources()
	name := func(dst string) string { return strings.TrimPrefix(at[dst], protocols.GuestSyncedDir+"/") }
	must(t, os.WriteFile(hosts, []byte("two"), 0o644))
	p.until("the host's change", func(files map[string]string) bool { return files[name("/etc/hosts")] == "two" })
	p.agent.Write(name("/etc/hosts"), "three")
	p.agent.Write(name("/dev/termination-log"), "last words")
	must(t, c.Init().Signal(bounded(t), 9, true))
	exit(t, c.Init())
	for path, want := range map[string]string{log: "last words", hosts: "three"} {
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%s holds %q, %v; want %q", path, got, err, want)
		}
	}
	must(t, c.Delete(bounded(t)))
}

// A guest that knows no synced volumes gets them through the share.
func TestGuestWithoutSyncedVolumes(t *testing.T) {
	p := newPod(t, func(p *pod) { p.agent.NoFiles = true })
	config := volume(t, filepath.Join(t.TempDir(), "pods/uid/volumes/kubernetes.io~configmap/config"), "one")
	cc := p.container("c1", "sleep")
	cc.Spec.Mounts = []specs.Mount{bindOf(config, "/config", "ro")}
	_, err := p.CreateContainer(bounded(t), cc)
	must(t, err)
	at := p.sources()["/config"]
	rel, ok := strings.CutPrefix(at, protocols.GuestSharedDir+"/")
	share, err := p.share()
	must(t, err)
	data, err := os.ReadFile(filepath.Join(share.Dir(), rel, "key"))
	if !ok || err != nil || string(data) != "one" {
		t.Errorf("%s: %q, %v", at, data, err)
	}
}

func TestVolumeThatIsMissing(t *testing.T) {
	p := newPod(t)
	for _, kind := range []string{"configmap", "empty-dir"} {
		cc := p.container("c1", "sleep")
		cc.Spec.Mounts = []specs.Mount{bindOf(filepath.Join(t.TempDir(), "pods/uid/volumes/kubernetes.io~"+kind+"/x"), "/x", "ro")}
		_, err := p.CreateContainer(bounded(t), cc)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "mounts[0] (/x)") {
			t.Errorf("%s: %v", kind, err)
		}
		p = newPod(t)
	}
}

// An emptyDir in memory is the guest's, of the size, mode and group that kubelet
// gave the host's, and outlives the container; one on disk is shared.
func TestMemoryEmptyDir(t *testing.T) {
	p := newPod(t)
	dir := filepath.Join(t.TempDir(), "pods/uid/volumes/kubernetes.io~empty-dir")
	must(t, os.MkdirAll(dir+"/memory", 0o755))
	must(t, os.MkdirAll(dir+"/disk", 0o755))
	must(t, unix.Mount("tmpfs", dir+"/memory", "tmpfs", 0, "size=64k,mode=2777,gid=2000"))
	t.Cleanup(func() { must(t, unix.Unmount(dir+"/memory", 0)) })
	cc := p.container("c1", "sleep")
	cc.Spec.Mounts = []specs.Mount{bindOf(dir+"/memory", "/memory", "rw"), bindOf(dir+"/disk", "/disk", "rw")}
	_, err := p.CreateContainer(bounded(t), cc)
	must(t, err)
	req := p.agent.Request("CreateContainer").(*agentpb.CreateContainerRequest)
	golden(t, "emptydir.json", req.Storages)
	at := p.sources()
	if want := protocols.GuestSandboxDir + "/ephemeral/memory"; at["/memory"] != want || !strings.HasPrefix(at["/disk"], protocols.GuestSharedDir+"/") {
		t.Errorf("%v; want %s and one in the share", at, want)
	}
}

func TestHugepageLimit(t *testing.T) {
	s := &specs.Spec{Linux: &specs.Linux{Resources: &specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{
		{Pagesize: "2MB", Limit: 4 << 20}, {Pagesize: "1GB", Limit: 2 << 30}, {Pagesize: "64KB", Limit: 5}, {Pagesize: "512MB"},
	}}}}
	for page, want := range map[uint64]uint64{2 << 20: 4 << 20, 1 << 30: 2 << 30, 64 << 10: 5} {
		if got, err := hugepageLimit(s, page); err != nil || got != want {
			t.Errorf("%d: %d, %v", page, got, err)
		}
	}
	for _, page := range []uint64{512 << 20, 1 << 20} {
		if _, err := hugepageLimit(s, page); err == nil || !strings.Contains(err.Error(), "MB") {
			t.Errorf("%d: %v", page, err)
		}
	}
}
