// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/kata-v2/kata/internal/ctl"
	"github.com/kata-v2/kata/internal/directvolume"
)

// kataCtl runs kata-ctl for the pods of this containerd.
func (b *box) kataCtl(args ...string) (stdout string, err error) {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(buildDir(b.T), "bin", "kata-ctl"), append([]string{"--state-dir", b.c.PodsDir()}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	b.Logf("kata-ctl %s: %s%s", strings.Join(args, " "), out, stderr.String())
	return string(out), err
}

// bytesOf are total and used bytes of a volume.
func (b *box) bytesOf(volume string) (total, used uint64) {
	b.Helper()
	out, err := b.kataCtl("direct-volume", "stats", volume)
	var s ctl.VolumeStats
	if err == nil {
		err = json.Unmarshal([]byte(out), &s)
	}
	if err != nil {
		b.Fatalf("stats: %v", err)
	}
	for _, u := range s.Usage {
		if u.Unit == "bytes" {
			total, used = u.Total, u.Used
		}
	}
	return total, used
}

// testDirectVolume: a file system on a block device of the host's that the host
// does not mount; measured and grown while a container writes to it.
func testDirectVolume(b *box) {
	dir := b.TempDir()
	volume, image := filepath.Join(dir, "pods", "uid", "volumes", "kubernetes.io~csi", "pvc", "mount"), filepath.Join(dir, "image")
	if err := os.MkdirAll(volume, 0o755); err != nil {
		b.Fatal(err)
	}
	writeFile(b.T, "", image)
	if err := os.Truncate(image, 32<<20); err != nil {
		b.Fatal(err)
	}
	// Room for descriptors of a larger file system, so that it can grow in place.
	if out, err := exec.Command("mkfs.ext4", "-q", "-E", "resize=200000", image).CombinedOutput(); err != nil {
		b.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	info := `{"volume-type":"block","device":"` + image + `","fstype":"ext4","metadata":{"fsGroup":"2000"},"options":["noatime"]}`
	if _, err := b.kataCtl("direct-volume", "add", volume, strings.Replace(info, image, "image", 1)); err == nil {
		b.Error("a device without an absolute path was registered")
	}
	if _, err := b.kataCtl("direct-volume", "add", volume, info); err != nil {
		b.Fatalf("add: %v", err)
	}
	b.Cleanup(func() {
		if err := directvolume.Remove(directvolume.Root, volume); err == nil {
			b.Error("the volume was registered still")
		}
		// Of the directories above only the empty ones.
		for d := directvolume.Root; d != "/run" && os.Remove(d) == nil; d = filepath.Dir(d) {
		}
	})
	if _, err := b.kataCtl("direct-volume", "stats", volume); err == nil {
		b.Error("a volume that no pod has was measured")
	}
	s := func(text string) *spec {
		return script(b.T, text).mount("bind", volume, "/data", "rbind", "rprivate", "rw")
	}
	b.startSpec("direct", s("exec sleep 1000"))
	if got := b.shell("direct", "grep ' /data ' /proc/mounts | cut -d' ' -f3; stat -c '%g %a' /data; echo kept >/data/file; sync"); got != "ext4\n2000 2775" {
		b.Errorf("the volume is %q; want ext4 of group 2000", got)
	}
	if r := b.runSpec("direct2", s("cat /data/file")); r.Stdout != "kept\n" {
		b.Errorf("a second container reads %+v", r)
	}
	before, used := b.bytesOf(volume)
	if before < 20<<20 || before > 32<<20 || used == 0 {
		b.Errorf("%d bytes, %d used of a disk of 32 MiB", before, used)
	}
	for _, size := range []string{"1048576", "0", "-67108864", "67108865", "9223372036854775296", "much"} {
		if _, err := b.kataCtl("direct-volume", "resize", volume, size); err == nil {
			b.Errorf("the volume was given the size %s", size)
		}
	}
	if st, err := os.Stat(image); err != nil || st.Size() != 32<<20 {
		b.Errorf("after sizes that were refused the disk has %d bytes, %v", st.Size(), err)
	}
	if _, err := b.kataCtl("direct-volume", "resize", volume, "67108864"); err != nil {
		b.Errorf("resize: %v", err)
	}
	if after, _ := b.bytesOf(volume); after < before+(28<<20) {
		b.Errorf("%d bytes after the disk grew from 32 to 64 MiB; %d before", after, before)
	}
	b.remove("direct")
	if _, err := b.kataCtl("direct-volume", "remove", volume); err != nil {
		b.Errorf("remove: %v", err)
	}
	if entries, err := os.ReadDir(volume); err != nil || len(entries) > 0 {
		b.Errorf("the volume's directory on the host: %v, %v", entries, err)
	}
}
