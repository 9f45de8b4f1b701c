// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/kata-v2/kata/integration/lab"
)

// The rows of root filesystems. In those called disk- Kata's is on a disk with
// EROFS, runc's on the host; in those called share- Kata's is shared by virtio-fs.
const (
	firstByte      = "first-byte-" // and the number of layers: `ctr run --rm` that reads a file
	shareFirstByte = sharePrefix + firstByte
	diskRead       = "disk-read" // a file of readBytes, read for the first time
	diskReadRaw    = "disk-read-raw"
	diskMetadata   = "disk-metadata" // find and stat over treeFiles files
	shareRead      = "share-read"
	shareMetadata  = "share-metadata"
	diskAttach     = "disk-attach" // how much longer a container takes that gets a disk in a running pod
)

const (
	readBytes = 32 << 20
	treeFiles = 1000
	// copiedFiles are those of the tree that is copied.
	copiedFiles = 250
)

// layerCounts are the images of firstByte.
var layerCounts = []int{1, 30, 100}

// blocks returns the bench on a containerd with the erofs snapshotter, the same
// every time; stopBlocks ends it.
func (e *Env) blocks(ctx context.Context) (*Env, error) {
	if e.onDisks != nil {
		return e.onDisks, nil
	}
	c, err := lab.Start(ctx, lab.Options{Version: e.o.Version, ShimDir: e.o.Bin, Snapshotter: "erofs", Kata: &lab.Kata{Images: e.o.Images}})
	if err != nil {
		return nil, err
	}
	b := &Env{o: e.o, c: c, dir: e.dir}
	err = c.ImportBusybox(ctx)
	for _, n := range layerCounts {
		if err == nil {
			err = e.importLayers(ctx, n, b, e)
		}
	}
	if err == nil {
		err = e.importTree(ctx, b)
	}
	if err != nil {
		return nil, errors.Join(err, c.Stop(context.WithoutCancel(ctx)))
	}
	e.onDisks = b
	return b, nil
}

func (e *Env) stopBlocks(ctx context.Context) error {
	if e.onDisks == nil {
		return nil
	}
	return e.onDisks.c.Stop(ctx)
}

func layersImage(n int) string { return fmt.Sprintf("example.com/layers-%d:latest", n) }

const treeImage = "example.com/tree:latest"

// importLayers imports an image of n layers, each of them with a file.
func (e *Env) importLayers(ctx context.Context, n int, to ...*Env) error {
	img, err := lab.Busybox()
	if err != nil {
		return err
	}
	img.Name = layersImage(n)
	for i := 1; i < n; i++ {
		img.Layers = append(img.Layers, []lab.File{{Path: fmt.Sprintf("layers/%d", i), Mode: 0o644, Data: []byte(img.Name)}})
	}
	return e.importImage(ctx, img, to...)
}

// importTree imports the image with a large file and a tree of small ones.
func (e *Env) importTree(ctx context.Context, b *Env) error {
	img, err := treeLayers(treeImage, treeFiles)
	if err != nil {
		return err
	}
	return e.importImage(ctx, img, b, e)
}

// treeLayers is an image with /big, of readBytes, and /tree, of files small ones.
func treeLayers(name string, files int) (lab.Image, error) {
	img, err := lab.Busybox()
	if err != nil {
		return img, err
	}
	img.Name = name
	big := make([]byte, readBytes)
	if _, err := rand.Read(big); err != nil {
		return img, err
	}
	layer := []lab.File{{Path: "big", Mode: 0o644, Data: big}}
	for i := range files {
		layer = append(layer, lab.File{Path: fmt.Sprintf("tree/%d/%d", i%20, i), Mode: 0o644, Data: []byte("small")})
	}
	img.Layers = append(img.Layers, layer)
	return img, nil
}

func (e *Env) importImage(ctx context.Context, img lab.Image, to ...*Env) error {
	path := filepath.Join(e.dir, "image.tar")
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	err = errors.Join(img.Write(f), f.Close())
	for _, env := range to {
		if err == nil {
			err = env.c.Import(ctx, path)
		}
	}
	return errors.Join(err, os.Remove(path))
}

// runImage runs a container of an image to its end and returns its output.
func (e *Env) runImage(ctx context.Context, runtime, image string, flags []string, args ...string) (out string, took time.Duration, err error) {
	all := append([]string{"run", "--rm", "--snapshotter", e.c.Snapshotter(), "--fifo-dir", e.c.FIFODir(), "--runtime", e.o.plugin(runtime)}, e.o.runFlags(runtime, flags...)...)
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	began := time.Now()
	r, err := e.c.Ctr(ctx, append(append(all, image, e.id()), args...)...)
	took = time.Since(began)
	if err == nil && r.Code != 0 {
		err = fmt.Errorf("%s of %s: exit status %d: %s", runtime, image, r.Code, strings.TrimSpace(r.Stderr))
	}
	return r.Stdout, took, err
}

// firstBytes measures how long a container takes to read a file of its image, by
// the number of layers: on a disk, shared, and with the other runtimes.
func (e *Env) firstBytes() Probe {
	var rows []Row
	for _, n := range layerCounts {
		rows = append(rows, Row{firstByte + strconv.Itoa(n), Kata, Milliseconds}, Row{shareFirstByte + strconv.Itoa(n), Kata, Milliseconds})
		for _, r := range e.o.runtimes()[1:] {
			rows = append(rows, Row{firstByte + strconv.Itoa(n), r, Milliseconds})
		}
	}
	return Probe{Rows: rows, Take: func(ctx context.Context, add Add) error {
		b, err := e.blocks(ctx)
		if err != nil {
			return err
		}
		for _, row := range rows {
			env, count := e, strings.TrimPrefix(strings.TrimPrefix(row.Name, sharePrefix), firstByte)
			if row.Runtime == Kata && !strings.HasPrefix(row.Name, sharePrefix) {
				env = b
			}
			n, err := strconv.Atoi(count)
			if err != nil {
				return err
			}
			_, took, err := env.runImage(ctx, row.Runtime, layersImage(n), nil, "head", "-c", "1", "/etc/passwd")
			if err != nil {
				return err
			}
			add(row, milliseconds(took))
		}
		return nil
	}}
}

// readScript prints how many seconds the first read of /big took, the same for
// /dev/raw if it is there, and for a walk of /tree.
const readScript = `t() { a=$(cut -d' ' -f1 /proc/uptime); "$@" >/dev/null || exit 1; b=$(cut -d' ' -f1 /proc/uptime); awk "BEGIN { print $b - $a + 0.005 }"; }
t dd if=/big of=/dev/null bs=1M 2>/dev/null
t find /tree -type f -exec stat -c %s {} +
if test -e /dev/raw; then t dd if=/dev/raw of=/dev/null bs=1M 2>/dev/null; fi`

// rootReads measures data and metadata of a root filesystem: on a disk beside a
// bare disk of the same machine, shared, and on the host.
func (e *Env) rootReads() Probe {
	read, raw, meta := Row{diskRead, Kata, MegabytesPerSecond}, Row{diskReadRaw, Kata, MegabytesPerSecond}, Row{diskMetadata, Kata, Milliseconds}
	shared, sharedMeta := Row{shareRead, Kata, MegabytesPerSecond}, Row{shareMetadata, Kata, Milliseconds}
	host, hostMeta := Row{diskRead, Runc, MegabytesPerSecond}, Row{diskMetadata, Runc, Milliseconds}
	rows := []Row{read, host, raw, meta, hostMeta, shared, sharedMeta}
	return Probe{Rows: rows, Take: func(ctx context.Context, add Add) error {
		b, err := e.blocks(ctx)
		if err != nil {
			return err
		}
		return withLoop(e.dir, func(dev string) error {
			for _, c := range []struct {
				env     *Env
				runtime string
				flags   []string
				rows    []Row
			}{
				{b, Kata, []string{"--mount", "type=bind,src=" + dev + ",dst=/dev/raw,options=rbind:ro"}, []Row{read, meta, raw}},
				{e, Kata, nil, []Row{shared, sharedMeta}}, {e, Runc, nil, []Row{host, hostMeta}},
			} {
				out, _, err := c.env.runImage(ctx, c.runtime, treeImage, c.flags, "sh", "-c", readScript)
				if err != nil {
					return err
				}
				if err := addReads(out, c.rows, add); err != nil {
					return err
				}
			}
			return nil
		})
	}}
}

// addReads adds the figures that readScript printed.
func addReads(out string, rows []Row, add Add) error {
	lines := strings.Fields(out)
	if len(lines) != len(rows) {
		return fmt.Errorf("%q: want %d numbers", out, len(rows))
	}
	for i, row := range rows {
		s, err := strconv.ParseFloat(lines[i], 64)
		if err != nil || s <= 0 {
			return fmt.Errorf("%q: want numbers of seconds", out)
		}
		if row.Unit == MegabytesPerSecond {
			add(row, readBytes/1e6/s)
		} else {
			add(row, 1000*s)
		}
	}
	return nil
}

// withLoop runs f with a block device of readBytes random bytes.
func withLoop(dir string, f func(dev string) error) error {
	path := filepath.Join(dir, "raw")
	data := make([]byte, readBytes)
	if _, err := rand.Read(data); err != nil {
		return err
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		return err
	}
	defer os.Remove(path)
	out, err := exec.Command("losetup", "--find", "--show", path).Output()
	if err != nil {
		return fmt.Errorf("losetup: %w", err)
	}
	dev := string(bytes.TrimSpace(out))
	err = f(dev)
	if out, derr := exec.Command("losetup", "--detach", dev).CombinedOutput(); derr != nil {
		err = errors.Join(err, fmt.Errorf("losetup: %w: %s", derr, out))
	}
	return err
}

// attach measures how much longer the creation of a container in a running pod
// takes when it gets a disk: plugged in, found by the guest, its number passed on.
func (e *Env) attach() Probe {
	row := Row{diskAttach, Kata, Milliseconds}
	return Probe{Rows: []Row{row}, Take: func(ctx context.Context, add Add) error {
		return withLoop(e.dir, func(dev string) error {
			return e.withContainer(ctx, Kata, Row{}, func(Row, float64) {}, func(pod string) error {
				member := []string{"--annotation", "io.containerd.runc.v2.group=" + pod}
				var took [3]time.Duration // the first one is not compared: it fills caches
				for i, flags := range [][]string{member, member, append(member, "--device", dev)} {
					_, _, err := e.runImage(ctx, Kata, lab.BusyboxImage, flags, "true")
					if err != nil {
						return err
					}
					phases, err := e.startPhases(ctx, fmt.Sprintf("bench-%d", e.serial))
					if err != nil {
						return err
					}
					for _, p := range phases {
						if p.Name == "t_container" {
							took[i] = p.Time
						}
					}
				}
				add(row, milliseconds(took[2]-took[1]))
				return nil
			})
		})
	}}
}
