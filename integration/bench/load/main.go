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
	// rounds are those of small files that count. One before them does not: an emulated
	// processor runs the kernel's code for the first time in it, which takes longer than
	// the files do.
	rounds = 4
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
	} {
		v, err := part.f()
		if err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
		fmt.Printf("%s %.3f\n", part.name, v)
	}
	if err := smallFiles(tree, dir); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// smallFiles prints the figures of small files: the milliseconds of a round.
func smallFiles(tree, dir string) error {
	parts := []struct {
		name string
		f    func() error
		took time.Duration // of all rounds
	}{
		{name: "create", f: func() error { return each(dir, create) }},
		{name: "stat", f: func() error { return each(dir, stat) }},
		{name: "unlink", f: func() error { return each(dir, os.Remove) }},
		{name: "copy", f: func() error { return copyTree(tree, filepath.Join(dir, "copy")) }},
	}
	for round := range rounds + 1 {
		for i := range parts {
			began := time.Now()
			if err := parts[i].f(); err != nil {
				return fmt.Errorf("%s: %w", parts[i].name, err)
			}
			if round > 0 {
				parts[i].took += time.Since(began)
			}
		}
		if err := os.RemoveAll(filepath.Join(dir, "copy")); err != nil {
			return err
		}
	}
	for _, p := range parts {
		fmt.Printf("%s %.3f\n", p.name, milliseconds(p.took)/rounds)
	}
	return nil
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
	return milliseconds(time.Since(began)) / syncs, nil
}

// each is f for each of the small files.
func each(dir string, f func(path string) error) error {
	for i := range files {
		if err := f(filepath.Join(dir, fmt.Sprintf("f%d", i))); err != nil {
			return err
		}
	}
	return nil
}

func create(path string) error { return os.WriteFile(path, make([]byte, 1024), 0o644) }

func stat(path string) error {
	_, err := os.Stat(path)
	return err
}

// copyTree copies a tree of small files.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
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

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
