// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/kata-v2/kata/integration/kubernetes/cluster"
	"github.com/kata-v2/kata/integration/lab"
)

// nodeLabel is set by the DaemonSet that installs the runtime.
const nodeLabel = "katacontainers.io/kata-runtime"

// delivered holds the manifests that operators get.
var delivered = filepath.Join("..", "..", "deploy")

// installedShim is where it puts the shim, installed all that it puts anywhere.
const installedShim = "/usr/local/bin/containerd-shim-kata-v2"

var installed = []string{
	installedShim, "/usr/local/bin/kata-ctl", "/usr/share/kata-containers", "/usr/share/defaults/kata-containers", "/etc/containerd/conf.d/kata.toml",
}

// deployGroup takes the runtime away from the node, as far as containerd knows it,
// and installs it by the DaemonSet that is delivered. The node's /usr and /etc are
// overlays, so they are the manifests themselves, hostPath / and all.
var deployGroup = group{
	name:   "DaemonSet",
	checks: []item{{"installs, a pod runs with what it installed, cleanup takes it off", deployed}},
}

func deployed(k *check) {
	k.ok(k.importDeploy(k.ctx(callTime)))
	restore, err := k.c.TakeOff(k.ctx(callTime))
	k.ok(err)
	stop := k.c.Restarts(k.ctx(readyTime + callTime))
	k.Cleanup(func() {
		// The node of the other checks again.
		_, err := stop()
		k.ok(errors.Join(err, restore(context.Background())))
		k.kubectl("label", "node", cluster.NodeName, nodeLabel+"=true", "--overwrite")
	})
	k.kubectl("label", "node", cluster.NodeName, nodeLabel+"-")

	// The handler that it installs, whatever that of the other checks is.
	k.ok(k.applyRuntimeClass(k.ctx(callTime), lab.HandlerSandbox))
	k.Cleanup(func() { k.ok(k.applyRuntimeClass(context.Background(), k.handler)) })
	began := time.Now()
	install := filepath.Join(delivered, "daemonset.yaml")
	k.kubectl("apply", "-f", install)
	k.Cleanup(func() { k.remove(install) })
	label := "{.metadata.labels." + strings.ReplaceAll(nodeLabel, ".", `\.`) + "}"
	k.wait("node/"+cluster.NodeName, "jsonpath="+label+"=true", readyTime)
	took := time.Since(began)
	k.sameFile(filepath.Join(os.Getenv("KATA_BUILD"), "bin", "containerd-shim-kata-v2"), installedShim)
	k.installedPod()

	k.kubectl("-n", "kube-system", "delete", "daemonset", "kata-deploy", "--cascade=foreground", "--timeout=60s")
	cleanup := filepath.Join(delivered, "cleanup.yaml")
	k.kubectl("apply", "-f", cleanup)
	k.Cleanup(func() { k.remove(cleanup) })
	k.await("the label's removal", func() bool { return k.field("node/"+cluster.NodeName, label) == "" })
	for _, path := range installed {
		k.await("removal of "+path, func() bool {
			_, err := os.Stat(path)
			return errors.Is(err, fs.ErrNotExist)
		})
	}
	if text := k.hostFile("/etc/containerd/config.toml"); strings.Contains(text, "kata.toml") || strings.Contains(text, "# kata") {
		k.Errorf("containerd's configuration is left with ours: %s", text)
	}
	k.note("installed and labelled after %.1f s", took.Seconds())
}

// installedPod runs a pod with the installed shim, under the installed handler.
func (k *check) installedPod() {
	k.Helper()
	undo, err := k.c.UseInstalled()
	k.ok(err)
	defer func() { k.ok(undo()) }()
	pod := manifest("installed.yaml")
	k.kubectl("apply", "-f", pod)
	defer k.remove(pod)
	k.wait("pod/installed", "condition=Ready", readyTime)
	if kernel := k.sh("installed", "uname -r"); kernel == k.hostFile("/proc/sys/kernel/osrelease") {
		k.Errorf("the pod runs on the node's kernel %s", kernel)
	}
	want, err := os.Stat(installedShim)
	k.ok(err)
	exes, err := filepath.Glob("/proc/[0-9]*/exe")
	k.ok(err)
	for _, exe := range exes {
		if got, err := os.Stat(exe); err == nil && os.SameFile(got, want) {
			return
		}
	}
	k.Errorf("no process runs %s", installedShim)
}

// sameFile compares the content of two files.
func (k *check) sameFile(a, b string) {
	k.Helper()
	x, errA := os.ReadFile(a)
	y, errB := os.ReadFile(b)
	k.ok(errors.Join(errA, errB))
	if !bytes.Equal(x, y) {
		k.Errorf("%s is not %s", b, a)
	}
}

// await waits for what the node's files show and nothing tells of.
func (k *check) await(what string, done func() bool) {
	k.Helper()
	ctx := k.ctx(callTime)
	for !done() {
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			k.Fatalf("%s: not within %v", what, callTime)
		}
	}
}

// importDeploy makes the image that the DaemonSet's manifest describes.
func (n *node) importDeploy(ctx context.Context) error {
	img := lab.Image{Name: "docker.io/library/kata-deploy:latest", Entrypoint: []string{"/kata/bin/kata-ctl"}, Layers: [][]lab.File{nil}}
	for _, dir := range []string{"bin", "images"} {
		entries, err := os.ReadDir(filepath.Join(os.Getenv("KATA_BUILD"), dir))
		if err != nil {
			return err
		}
		for _, e := range entries {
			data, err := os.ReadFile(filepath.Join(os.Getenv("KATA_BUILD"), dir, e.Name()))
			if err != nil {
				return err
			}
			img.Layers[0] = append(img.Layers[0], lab.File{Path: "kata/" + dir + "/" + e.Name(), Mode: 0o755, Data: data})
		}
	}
	return n.c.Containerd.ImportImage(ctx, img)
}
