// SPDX-License-Identifier: Apache-2.0

// Command load is what the bench runs in containers to measure a file system: a
// static program, the same under every runtime. It prints one line for each
// figure, "name value", and leaves nothing in DIR.
//
//	load BIG TREE DIR
//
// BIG is a large file and TREE a tree of small ones, both of the image; DIR is
// where it writes. The caches of the kernel that it runs on are emptied of BIG first.
package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	block    = 4096 // bytes of one random access
	accesses = 1000 // of one figure
	syncs    = 50
	files    = 200
	// written is the size of the file that is written to at random.
	written = 16 << 20
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: load BIG TREE DIR")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}

func run(big, tree, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, part := range []struct {
		name string
		f    func() (float64, error)
	}{
		{"rand-read", func() (float64, error) { return randomRead(big) }},
		{"rand-write", func() (float64, error) { return randomWrite(filepath.Join(dir, "written")) }},
		{"fsync", func() (float64, error) { return fsync(filepath.Join(dir, "synced")) }},
		{"create", func() (float64, error) { return each(dir, create) }},
		{"stat", func() (float64, error) { return each(dir, stat) }},
		{"unlink", func() (float64, error) { return each(dir, os.Remove) }},
		{"copy", func() (float64, error) { return copyTree(tree, filepath.Join(dir, "copy")) }},
	} {
		v, err := part.f()
		if err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
		fmt.Printf("%s %.3f\n", part.name, v)
	}
	return os.RemoveAll(dir)
}

// offsets are the same ones in every run.
func offsets(size int64) []int64 {
	r := rand.New(rand.NewPCG(1, 2))
	out := make([]int64, accesses)
	for i := range out {
		out[i] = r.Int64N(size/block) * block
	}
	return out
}

// randomRead is how many blocks of a file are read in a second, in random order,
// by one reader.
func randomRead(path string) (float64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if st.Size() < block {
		return 0, fmt.Errorf("%s has %d bytes: want at least %d", path, st.Size(), block)
	}
	_ = f.Sync() // what is not on the disk yet stays cached; a file system without writes has no fsync
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return 0, err
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		return 0, err
	}
	buf := make([]byte, block)
	began := time.Now()
	for _, at := range offsets(st.Size()) {
		if _, err := f.ReadAt(buf, at); err != nil {
			return 0, err
		}
	}
	return accesses / time.Since(began).Seconds(), nil
}

// randomWrite is how many blocks are written in a second until all of them are on the disk.
func randomWrite(path string) (_ float64, err error) {
	f, err := os.Create(path)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(make([]byte, written)); err != nil {
		return 0, err
	}
	if err := f.Sync(); err != nil {
		return 0, err
	}
	buf := make([]byte, block)
	began := time.Now()
	for i, at := range offsets(written) {
		buf[0] = byte(i)
		if _, err := f.WriteAt(buf, at); err != nil {
			return 0, err
		}
	}
	if err := f.Sync(); err != nil {
		return 0, err
	}
	return accesses / time.Since(began).Seconds(), nil
}

// fsync is the milliseconds that one appended block takes to be on the disk.
func fsync(path string) (_ float64, err error) {
	f, err := os.Create(path)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	buf := make([]byte, block)
	began := time.Now()
	for range syncs {
		if _, err := f.Write(buf); err != nil {
			return 0, err
		}
		if err := f.Sync(); err != nil {
			return 0, err
		}
	}
	return milliseconds(began) / syncs, nil
}

// each is the milliseconds that f takes for each of the small files together.
func each(dir string, f func(path string) error) (float64, error) {
	began := time.Now()
	for i := range files {
		if err := f(filepath.Join(dir, fmt.Sprintf("f%d", i))); err != nil {
			return 0, err
		}
	}
	return milliseconds(began), nil
}

func create(path string) error { return os.WriteFile(path, make([]byte, 1024), 0o644) }

func stat(path string) error {
	_, err := os.Stat(path)
	return err
}

// copyTree is the milliseconds that a copy of a tree of small files takes.
func copyTree(from, to string) (float64, error) {
	began := time.Now()
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o755)
		}
		return copyFile(path, filepath.Join(to, rel))
	})
	return milliseconds(began), err
}

func copyFile(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	_, err = io.Copy(out, in)
	return err
}

func milliseconds(began time.Time) float64 {
	return float64(time.Since(began)) / float64(time.Millisecond)
}
