// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/kata-v2/kata/integration/lab"
)

// testSharedVolume: containers of a pod that mount a volume of the host in the same
// way see the same files: a lock that one holds is held for the other, a FIFO leads
// from one to the other, and what one writes to is at once longer for the other, in
// a directory and in a file that is mounted by itself. What the host has replaced
// since is another volume.
func testSharedVolume(b *box) {
	dir := filepath.Join(b.TempDir(), "volume")
	file := writeFile(b.T, "", dir, "file")
	volumes := func(t *testing.T) *spec {
		return member(t, "sleep", "1000").mount("bind", dir, "/d", "rbind", "rw", "rprivate").mount("bind", file, "/f", "rbind", "rw", "rprivate")
	}
	b.startSpec("left", volumes(b.T))
	b.startSpec("right", volumes(b.T))
	b.shell("left", "mkfifo /d/fifo; stat -c %s /d/file /f")
	held := make(chan lab.Result, 1)
	go func() {
		held <- b.exec("right", "sh", "-c", "exec 3>>/f; flock 3; echo longer >&3; echo x >/d/held; cat /d/fifo")
	}()
	wait := "until [ -e /d/held ]; do usleep 20000; done; stat -c %s /f; flock -n /f true || echo locked; echo through >/d/fifo"
	if got := b.shell("left", wait); got != "7\nlocked" {
		b.Errorf("beside a container that has written and holds a lock: %q", got)
	}
	b.want(<-held, 0, "through\n")
	if err := os.Rename(dir, dir+".was"); err != nil {
		b.Fatal(err)
	}
	writeFile(b.T, "replaced", dir, "file")
	if r := b.runSpec("later", script(b.T, "cat /d/file; ls /d").mount("bind", dir, "/d", "rbind", "rw", "rprivate")); r.Stdout != "replacedfile\n" {
		b.Errorf("a container that comes after the volume was replaced: %+v", r)
	}
	b.remove("left")
	if got := b.shell("right", "cat /f /d/held"); got != "longer\nx" {
		b.Errorf("after the other container's end: %q", got)
	}
	b.remove("right")
}
