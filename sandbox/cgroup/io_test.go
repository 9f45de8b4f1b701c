// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"os"
	"slices"
	"testing"
)

// The files of both versions, and nothing where the controller is not.
func TestIOSettings(t *testing.T) {
	dev, rate := IODevice{8, 16}, IORate{ReadBytes: 5, WriteOps: 7}
	var got []string
	for _, d := range []Dir{{V2: true}, {Controllers: []string{"blkio"}}, {Controllers: []string{"cpu"}}} {
		for _, s := range ioSettings(dev, rate, d) {
			got = append(got, s.file+" = "+s.value)
		}
	}
	want := []string{
		"io.max = 8:16 rbps=5 wbps=max riops=max wiops=7",
		"blkio.throttle.read_bps_device = 8:16 5", "blkio.throttle.write_bps_device = 8:16 0",
		"blkio.throttle.read_iops_device = 8:16 0", "blkio.throttle.write_iops_device = 8:16 7",
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// Only what differs is written, and a rate that is gone is taken away.
func TestSetIO(t *testing.T) {
	dir := t.TempDir()
	g := &Group{plan: Plan{Dirs: []Dir{{Path: dir, Controllers: []string{"blkio"}}}}}
	file := dir + "/blkio.throttle.read_bps_device"
	holds := func(want string) {
		t.Helper()
		if got, err := os.ReadFile(file); err != nil || string(got) != want {
			t.Errorf("%q, %v; want %q", got, err, want)
		}
	}
	for _, name := range []string{"read_bps", "write_bps", "read_iops", "write_iops"} {
		if err := os.WriteFile(dir+"/blkio.throttle."+name+"_device", nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []struct {
		rates map[IODevice]IORate
		want  string
	}{
		{nil, ""}, {map[IODevice]IORate{{8, 0}: {ReadBytes: 100}}, "8:0 100"}, {map[IODevice]IORate{}, "8:0 0"},
	} {
		if err := os.Truncate(file, 0); err != nil { // as each write to a file of a cgroup stands by itself
			t.Fatal(err)
		}
		if err := g.SetIO(step.rates); err != nil {
			t.Fatal(err)
		}
		holds(step.want)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := g.SetIO(nil); err != nil {
		t.Fatal(err)
	}
	holds("")
}
