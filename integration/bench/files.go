// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/integration/lab"
)

// The prefixes of the rows of file systems.
const (
	diskPrefix  = "disk-"
	sharePrefix = "share-"
)

// loadProgram is built into the image that file systems are measured with.
const loadProgram = "github.com/kata-v2/kata/integration/bench/load"

// upperSize is that of the ext4 on which the measured containers write.
const upperSize = "256MiB"

// loadFigures are the lines of loadProgram, in its order.
var loadFigures = []struct {
	name string
	unit Unit
}{
	{"rand-read", PerSecond}, {"rand-write", PerSecond}, {"fsync", Milliseconds},
	{"create", Milliseconds}, {"stat", Milliseconds}, {"unlink", Milliseconds}, {"copy", Milliseconds},
}

func loadRows(prefix, runtime string) []Row {
	var rows []Row
	for _, f := range loadFigures {
		rows = append(rows, Row{prefix + f.name, runtime, f.unit})
	}
	return rows
}

// writable returns the bench on a containerd with the erofs snapshotter that
// makes an ext4 for what a container writes, the same every time; stopWritable ends it.
func (e *Env) writable(ctx context.Context) (*Env, error) {
	if e.onUppers != nil {
		return e.onUppers, nil
	}
	c, err := lab.Start(ctx, lab.Options{
		Version: e.o.Version, ShimDir: e.o.Bin, Snapshotter: "erofs", EROFS: lab.EROFS{UpperSize: upperSize}, Kata: &lab.Kata{Images: e.o.Images},
	})
	if err != nil {
		return nil, err
	}
	w := &Env{o: e.o, c: c, dir: e.dir}
	if err := e.importLoad(ctx, w); err != nil {
		return nil, errors.Join(err, c.Stop(context.WithoutCancel(ctx)))
	}
	e.onUppers = w
	return w, nil
}

func (e *Env) stopWritable(ctx context.Context) error {
	if e.onUppers == nil {
		return nil
	}
	return e.onUppers.c.Stop(ctx)
}

const loadImage = "example.com/load:latest"

// importLoad builds loadProgram and imports the image with it.
func (e *Env) importLoad(ctx context.Context, w *Env) error {
	path := filepath.Join(e.dir, "load")
	if err := buildProgram(ctx, path, loadProgram); err != nil {
		return err
	}
	program, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	img, err := treeLayers(loadImage, copiedFiles)
	if err != nil {
		return err
	}
	img.Layers = append(img.Layers, []lab.File{{Path: "bin/load", Mode: 0o755, Data: program}})
	return e.importImage(ctx, img, w, e)
}

// fileSystems measures what programs do with files: on a disk of EROFS layers
// with an ext4 above, shared by virtio-fs, and on the host's own overlayfs.
func (e *Env) fileSystems() Probe {
	disk, share, host := loadRows(diskPrefix, Kata), loadRows(sharePrefix, Kata), loadRows(diskPrefix, Runc)
	return Probe{Rows: slices.Concat(disk, host, share), Take: func(ctx context.Context, add Add) error {
		w, err := e.writable(ctx)
		if err != nil {
			return err
		}
		for _, c := range []struct {
			env     *Env
			runtime string
			rows    []Row
		}{{w, Kata, disk}, {e, Kata, share}, {e, Runc, host}} {
			if err := dropCaches(c.env.c.Root); err != nil {
				return err
			}
			out, _, err := c.env.runImage(ctx, c.runtime, loadImage, nil, "load", "/big", "/tree", "/work")
			if err != nil {
				return err
			}
			if err := addLoad(out, c.rows, add); err != nil {
				return fmt.Errorf("%s: %w", c.rows[0].Name, err)
			}
		}
		return nil
	}}
}

// dropCaches empties the host's cache of the large files below a directory, so
// that every runtime reads from the disk.
func dropCaches(root string) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed meanwhile
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return nil // the same
		}
		defer f.Close()
		if st, err := f.Stat(); err != nil || st.Size() < 1<<20 {
			return err
		}
		if err := f.Sync(); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	})
}

// addLoad adds what loadProgram printed.
func addLoad(out string, rows []Row, add Add) error {
	fields := strings.Fields(out)
	if len(fields) != 2*len(rows) {
		return fmt.Errorf("%q: want %d lines with a name and a number", out, len(rows))
	}
	for i, row := range rows {
		v, err := strconv.ParseFloat(fields[2*i+1], 64)
		if err != nil || v < 0 || !strings.HasSuffix(row.Name, "-"+fields[2*i]) {
			return fmt.Errorf("%q: want the figure %s", out, row.Name)
		}
		add(row, v)
	}
	return nil
}
