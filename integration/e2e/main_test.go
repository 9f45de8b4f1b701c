// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/kata-v2/kata/integration/lab"
	"github.com/kata-v2/kata/integration/lab/leak"
)

// runtimeName is the shim under test.
const runtimeName = "io.containerd.kata.v2"

// callTimeout bounds one ctr call or one call to a shim.
const callTimeout = 60 * time.Second

// shared is the containerd of all tests that need no other.
var shared struct {
	once sync.Once
	c    *lab.Containerd
	err  error
}

// TestMain ends the shared containerd and looks for leftovers of the whole run.
func TestMain(m *testing.M) {
	os.Exit(leak.Main(m, "e2e", func() (err error) {
		if shared.c != nil {
			ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
			defer cancel()
			err = shared.c.Stop(ctx)
		}
		return errors.Join(err, os.RemoveAll(work.dir))
	}))
}

// work is a directory for what several tests use, made on first use.
var work struct {
	sync.Mutex
	dir string
}

// workDir returns the directory, which TestMain removes.
func workDir(t *testing.T) string {
	t.Helper()
	work.Lock()
	defer work.Unlock()
	if work.dir == "" {
		dir, err := os.MkdirTemp("", "kata-e2e-")
		if err != nil {
			t.Fatal(err)
		}
		work.dir = dir
	}
	return work.dir
}

// buildDir is where `make image` puts its results.
func buildDir(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("KATA_BUILD")
	if dir == "" {
		t.Fatal("KATA_BUILD is not set: it names the directory with bin/ and images/; run by make")
	}
	return dir
}

// labOptions are those of a containerd with the shim under test.
func labOptions(t *testing.T) lab.Options {
	t.Helper()
	build := buildDir(t)
	return lab.Options{
		Version: "2.4", ShimDir: filepath.Join(build, "bin"),
		Kata: &lab.Kata{Images: filepath.Join(build, "images")},
	}
}

// startLab starts a containerd that has the busybox image.
func startLab(o lab.Options) (*lab.Containerd, error) {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	c, err := lab.Start(ctx, o)
	if err != nil {
		return nil, err
	}
	if err := c.ImportBusybox(ctx); err != nil {
		return nil, errors.Join(err, c.Stop(ctx))
	}
	return c, nil
}

// newBox begins a test on the shared containerd.
func newBox(t *testing.T) *box {
	t.Helper()
	o := labOptions(t)
	shared.once.Do(func() { shared.c, shared.err = startLab(o) })
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return begin(t, shared.c)
}

// newOwnBox begins a test on a containerd of its own; the snapshot is from before its start.
func newOwnBox(t *testing.T, o lab.Options) *box {
	t.Helper()
	leak.Check(t)
	c, err := startLab(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
		defer cancel()
		if err := c.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	return boxOf(t, c)
}
