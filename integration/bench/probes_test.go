// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"slices"
	"strings"
	"testing"
)

// TestProbesAreKnown: every row has one unit and one probe, and the figures to
// reach, the ratios and the rows made of others speak of rows that there are.
func TestProbesAreKnown(t *testing.T) {
	e := &Env{o: Options{N: MinSamples, Version: "2.4", Peers: []Peer{{Name: "gvisor", Runtime: "io.containerd.runsc.v1"}}}, phases: []string{"t_boot"}}
	seen, names, units := map[Row]bool{}, []string{shimSizeRow, guestRootSizeRow}, map[string]Unit{}
	for _, p := range e.Probes() {
		for _, r := range p.Rows {
			key := Row{Name: r.Name, Runtime: r.Runtime}
			if seen[key] {
				t.Errorf("%s/%s is measured by two probes", r.Name, r.Runtime)
			}
			if u, known := units[r.Name]; known && u != r.Unit {
				t.Errorf("%s is in %s and in %s", r.Name, u, r.Unit)
			}
			seen[key], units[r.Name] = true, r.Unit
			names = append(names, r.Name)
		}
	}
	var refer []string
	for _, d := range derivations {
		refer = append(refer, d.from...)
		names = append(names, d.name)
	}
	for name, other := range references {
		refer = append(refer, name, other)
		if units[name] != units[other] {
			t.Errorf("%s is in %s and %s, which it is compared with, in %s", name, units[name], other, units[other])
		}
	}
	for _, target := range targets {
		refer = append(refer, target.name)
	}
	for _, name := range refer {
		if !slices.Contains(names, name) {
			t.Errorf("%s is measured by no probe", name)
		}
	}
	// Names that other programs rely on.
	for _, name := range []string{cloneStart, restoreRow, clonePSS, "pod-start", "pod-start-cold", "pod-start-16", "delete", "vsock-up", "vsock-down", "stdio"} {
		if !slices.Contains(names, name) {
			t.Errorf("%s is missing", name)
		}
	}
	for _, row := range []Row{{Name: "pod-start-4", Runtime: "gvisor"}, {Name: "cold-start", Runtime: "gvisor"}, {Name: "stdio-out", Runtime: Runc}} {
		if !seen[row] {
			t.Errorf("%s/%s is missing", row.Name, row.Runtime)
		}
	}
}

func TestAddLoad(t *testing.T) {
	rows := loadRows(sharePrefix, Kata)
	var out strings.Builder
	for i, f := range loadFigures {
		out.WriteString(f.name + " " + string(rune('1'+i)) + ".5\n")
	}
	got := map[Row]float64{}
	if err := addLoad(out.String(), rows, func(r Row, v float64) { got[r] = v }); err != nil {
		t.Fatal(err)
	}
	if len(got) != len(rows) || got[Row{"share-fsync", Kata, Milliseconds}] != 3.5 {
		t.Errorf("got %v", got)
	}
	for _, bad := range []string{"", "rand-read 1\n", strings.Replace(out.String(), "fsync", "sync", 1), strings.Replace(out.String(), "3.5", "x", 1)} {
		if err := addLoad(bad, rows, func(Row, float64) {}); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}
