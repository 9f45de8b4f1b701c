// SPDX-License-Identifier: Apache-2.0

// Package e2e runs containers in virtual machines through a real containerd.
package e2e

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kata-v2/kata/integration/lab"
	"github.com/kata-v2/kata/integration/lab/leak"
)

const runtimeName = "io.containerd.kata.v2"

// start gives the test a containerd and fails it when anything is left.
func start(t *testing.T, set map[string]string) *lab.Containerd {
	t.Helper()
	leak.Check(t)
	build := os.Getenv("KATA_BUILD")
	if build == "" {
		t.Fatal("KATA_BUILD is not set: run by make")
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c, err := lab.Start(ctx, lab.Options{
		Version: "2.4", ShimDir: filepath.Join(build, "bin"),
		Kata: &lab.Kata{Images: filepath.Join(build, "images"), Set: set},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, l := range c.Log() {
				t.Log(l)
			}
		}
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := c.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	if err := c.ImportBusybox(ctx); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestRun(t *testing.T) {
	c := start(t, nil)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	r, err := c.Run(ctx, runtimeName, "r1", nil, "sh", "-c", "echo out; echo err >&2; exit 7")
	t.Logf("%+v %v", r, err)
	if r.Code != 7 || r.Stdout != "out\n" {
		t.Error("wrong")
	}
}
