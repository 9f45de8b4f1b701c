// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// writeVolume writes a volume as kubelet does (pkg/volume/util/atomic_writer.go):
// the files in a new directory, then the link to it replaced, then the old one removed.
func writeVolume(t *testing.T, dir, version string, files map[string]string) {
	t.Helper()
	old, _ := os.Readlink(filepath.Join(dir, "..data"))
	for name, content := range files {
		writeFile(t, content, dir, ".."+version, name)
		if err := os.Symlink("..data/"+name, filepath.Join(dir, name)); err != nil && !os.IsExist(err) {
			t.Fatal(err)
		}
	}
	tmp := filepath.Join(dir, "..data_tmp")
	if err := os.Symlink(".."+version, tmp); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
	if old != "" {
		if err := os.RemoveAll(filepath.Join(dir, old)); err != nil {
			t.Fatal(err)
		}
	}
}

// buildNotify builds a program that says what inotify tells it, and returns its directory.
func buildNotify(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", filepath.Join(dir, "notify"), "./testdata/notify")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build notify: %v: %s", err, out)
	}
	return dir
}

// testSyncedVolumes: a ConfigMap and a file that an engine writes are in the
// guest's memory, follow the host, and tell their watchers so.
func testSyncedVolumes(b *box) {
	pod := filepath.Join(b.TempDir(), "pods", "uid")
	config := filepath.Join(pod, "volumes", "kubernetes.io~configmap", "config")
	writeVolume(b.T, config, "1", map[string]string{"key": "one", "other": "fixed"})
	if err := os.Chmod(filepath.Join(config, "..1", "key"), 0o440); err != nil {
		b.Fatal(err)
	}
	hosts := writeFile(b.T, "192.0.2.7 seven\n", pod, "hosts")
	s := script(b.T, "exec /tools/notify /config >/events").
		mount("bind", buildNotify(b.T), "/tools", "rbind", "ro").
		mount("bind", config, "/config", "rbind", "rprivate", "ro").
		mount("bind", hosts, "/etc/hosts", "rbind", "rprivate", "ro")
	b.startSpec("synced", s)
	if got := b.shell("synced", "cat /config/key /config/other /etc/hosts; stat -L -c %a /config/key; readlink /config/..data"); got != "onefixed192.0.2.7 seven\n440\n..1" {
		b.Errorf("the container reads %q", got)
	}
	for _, at := range []string{"/config", "/etc/hosts"} {
		if got := b.shell("synced", "grep ' "+at+" ' /proc/mounts"); strings.Contains(got, "virtiofs") || !strings.Contains(got, " ro,") {
			b.Errorf("%s is mounted as %q; want the guest's memory, read-only", at, got)
		}
	}
	b.shell("synced", "until grep -q ready /events; do usleep 10000; done")
	began := time.Now()
	writeVolume(b.T, config, "2", map[string]string{"key": "two", "other": "fixed"})
	b.shell("synced", "until [ \"$(cat /config/key)\" = two ]; do usleep 5000; done")
	b.Logf("the update was seen after %v, the time of an exec included", time.Since(began))
	b.shell("synced", "until grep -q ^[.][.]data$ /events; do usleep 5000; done; ! ls -a /config | grep -q '^[.][.]1$'")
	writeFile(b.T, "192.0.2.8 eight\n", hosts)
	b.shell("synced", "until grep -q eight /etc/hosts; do usleep 5000; done")
	if r := b.exec("synced", "sh", "-c", "echo x >/config/key"); r.Code == 0 {
		b.Error("a container wrote to a ConfigMap")
	}
	b.remove("synced")
}
