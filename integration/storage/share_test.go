// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/kata-v2/kata/integration/lab"
)

// TestShareWhenNeeded: a pod of several containers has no virtio-fs daemon, also
// with files that it may write to, until a container needs one; then all have it.
func TestShareWhenNeeded(t *testing.T) {
	b := openBox(t, "quota", quota())
	member := []string{"--annotation", "io.containerd.runc.v2.group=late"}
	dir := t.TempDir()
	hosts := filepath.Join(dir, "hosts")
	b.must(os.WriteFile(hosts, []byte("192.0.2.7 seven\n"), 0o644))
	b.start(lab.BusyboxImage, "late", append([]string{"--mount", "type=bind,src=" + hosts + ",dst=/etc/hosts,options=rbind:rw"}, member...)...)
	shares := func() bool { return strings.Contains(strings.Join(b.processes("late"), "\n"), "virtiofsd") }
	b.shell("late", "echo 192.0.2.8 eight >>/etc/hosts")
	if shares() {
		t.Error("a virtio-fs daemon in a pod that shares nothing")
	}
	file := filepath.Join(dir, "data", "file")
	b.must(os.Mkdir(filepath.Dir(file), 0o755))
	b.must(os.WriteFile(file, []byte("from the host"), 0o644))
	flags := append([]string{"--mount", "type=bind,src=" + filepath.Dir(file) + ",dst=/data,options=rbind:rw"}, member...)
	var wg sync.WaitGroup
	for _, id := range []string{"late1", "late2"} { // at once: one share for both
		wg.Go(func() {
			r := b.ctr(b.runArgs(lab.BusyboxImage, id, append([]string{"--rm"}, flags...), "sh", "-c", "cat /data/file; echo "+id+" >/data/"+id)...)
			if r.Code != 0 || r.Stdout != "from the host" {
				t.Errorf("%s: %+v", id, r)
			}
			if got, err := os.ReadFile(filepath.Join(dir, "data", id)); err != nil || string(got) != id+"\n" {
				t.Errorf("%s has written %q, %v", id, got, err)
			}
		})
	}
	wg.Wait()
	if !shares() {
		t.Error("no virtio-fs daemon, though files are shared")
	}
	want(t, "the first container afterwards", b.shell("late", "cat /etc/hosts"), "192.0.2.7 seven\n192.0.2.8 eight")
	b.remove("late")
}
