// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestBadProbes: a probe that fails has no figures and is not tried again; the others go on.
func TestBadProbes(t *testing.T) {
	row, other, good := Row{"a", Kata, Milliseconds}, Row{"b", Kata, Milliseconds}, Row{"c", Kata, Milliseconds}
	for name, c := range map[string]struct {
		take func(round int, add Add) error
		want string
	}{
		"no sample":    {func(int, Add) error { return nil }, "0 samples of a/kata: want 1"},
		"too many":     {func(_ int, add Add) error { add(row, 1); add(row, 1); return nil }, "2 samples of a/kata: want 1"},
		"foreign row":  {func(_ int, add Add) error { add(row, 1); add(other, 1); return nil }, "b/kata, which is not one of the probe's rows"},
		"failed probe": {func(int, Add) error { return errors.New("no machine") }, "warm-up: no machine"},
		"later":        {func(n int, add Add) error { add(row, 1); return map[int]error{2: errors.New("gone")}[n] }, "round 2: a: gone"},
	} {
		calls, n := 0, 0
		probes := []Probe{
			{Rows: []Row{row}, Take: func(_ context.Context, add Add) error { calls++; return c.take(calls-1, add) }},
			{Rows: []Row{good}, Take: func(_ context.Context, add Add) error { n++; add(good, 1); return nil }},
		}
		r := runner{n: 3, progress: &bytes.Buffer{}}
		if err := r.run(t.Context(), probes); err != nil {
			t.Fatal(err)
		}
		failed := r.failures(probes)
		if len(failed) != 1 || !strings.Contains(failed[0].Error, c.want) || !slices.Equal(failed[0].Rows, []string{"a/kata"}) {
			t.Errorf("%s: %+v; want %q", name, failed, c.want)
		}
		if got := r.results(probes); len(got) != 1 || got[0].Name != "c" || got[0].N != 3 || calls > 3 || r.complete(probes) {
			t.Errorf("%s: results %+v after %d calls, complete %v; want those of c only", name, got, calls, r.complete(probes))
		}
	}
}

func TestInterrupt(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	row := Row{"a", Kata, Milliseconds}
	r := runner{n: 3, progress: &bytes.Buffer{}}
	err := r.run(ctx, []Probe{{Rows: []Row{row}, Take: func(ctx context.Context, _ Add) error { cancel(); return ctx.Err() }}})
	if !errors.Is(err, context.Canceled) || len(r.failed) > 0 {
		t.Errorf("got %v, failures %v; want the run to end", err, r.failed)
	}
}

// TestResume: a run that was cut off in its second round goes on with what its file has.
func TestResume(t *testing.T) {
	path := filepath.Join(t.TempDir(), "b.json")
	rows := []Row{{"a", Kata, Milliseconds}, {"b", Kata, Milliseconds}, {"apart", Kata, Percent}, {"slow", Kata, Milliseconds}}
	facts := []Fact{{factPrograms, "one"}}
	taken := map[string]int{}
	probes := func(cut func(name string) bool) []Probe {
		var out []Probe
		for i, row := range rows {
			p := Probe{Rows: []Row{row}, Apart: i == 2, Take: func(_ context.Context, add Add) error {
				taken[row.Name]++
				if cut(row.Name) {
					return errors.New("cut off")
				}
				for range map[bool]int{true: 3, false: 1}[i == 2] {
					add(row, float64(taken[row.Name]))
				}
				return nil
			}}
			if i == 3 {
				p.Most = 1
			}
			out = append(out, p)
		}
		return out
	}
	ctx, cancel := context.WithCancel(t.Context())
	first := probes(func(name string) bool {
		if name == "b" && taken["b"] == 3 {
			cancel()
			return true
		}
		return false
	})
	r := runner{n: 3, progress: &bytes.Buffer{}}
	r.save = func() error {
		return (&Report{Facts: facts, Complete: r.complete(first), Results: r.results(first)}).WriteFile(path)
	}
	if err := r.run(ctx, first); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	was, err := ReadFile(path)
	if err != nil || was.Complete {
		t.Fatalf("%+v, %v; want an incomplete report", was, err)
	}
	if err := was.resumable([]Fact{{factPrograms, "two"}}); err == nil || !strings.Contains(err.Error(), `"one"`) || was.resumable(facts) != nil {
		t.Errorf("another build: %v; want it refused, the same one not", err)
	}
	again := probes(func(string) bool { return false })
	r = runner{n: 3, progress: &bytes.Buffer{}, samples: was.samples()}
	if err := r.run(t.Context(), again); err != nil || !r.complete(again) {
		t.Fatal(err)
	}
	// Calls: a warm-up each (not of apart and slow), and in the second part again only for what was not done.
	want := map[Row][]float64{rows[0]: {2, 3, 5}, rows[1]: {2, 5, 6}, rows[2]: {1, 1, 1}, rows[3]: {1}}
	if !reflect.DeepEqual(r.samples, want) {
		t.Errorf("samples %v; want %v", r.samples, want)
	}
}

func TestBudget(t *testing.T) {
	row := Row{"a", Kata, Milliseconds}
	calls := 0
	r := runner{n: 3, progress: &bytes.Buffer{}}
	probes := []Probe{{Rows: []Row{row}, Take: func(_ context.Context, add Add) error {
		if calls++; calls == 2 {
			r.until = time.Now().Add(-time.Second)
		}
		add(row, 1)
		return nil
	}}}
	if err := r.run(t.Context(), probes); err != nil || calls != 2 || r.complete(probes) {
		t.Errorf("%d calls, %v; want a warm-up and one sample, and no complete report", calls, err)
	}
	rep := Report{Short: r.missesOf(probes), Results: r.results(probes)}
	var out bytes.Buffer
	if err := rep.WriteTable(&out); err != nil || !strings.Contains(out.String(), "not complete: a/kata has 1 of 3 samples\n") {
		t.Errorf("%v; the table says\n%s", err, out.String())
	}
}

// TestLeftOut: what there is no time for is left out as a whole, and so the rest has all its samples.
func TestLeftOut(t *testing.T) {
	var probes []Probe
	calls := map[string]int{}
	for _, name := range []string{BaseRow, podStart, "slow", "last", "apart"} {
		row := Row{name, Kata, Milliseconds}
		probes = append(probes, Probe{Rows: []Row{row}, Apart: name == "apart", Take: func(_ context.Context, add Add) error {
			calls[name]++
			for range map[bool]int{true: 3, false: 1}[name == "apart"] {
				add(row, 1)
			}
			return nil
		}})
	}
	probes[4].Takes = time.Hour
	var said bytes.Buffer
	r := runner{n: 3, progress: &said, until: time.Now().Add(time.Minute)}
	if err := r.run(t.Context(), probes); err != nil {
		t.Fatal(err)
	}
	if want := map[string]int{BaseRow: 4, podStart: 4, "slow": 4, "last": 4}; !reflect.DeepEqual(calls, want) || !strings.Contains(said.String(), "left out for want of time: apart, about 1h0m0s\n") {
		t.Errorf("calls %v, want %v; said\n%s", calls, want, said.String())
	}
	if want := []Short{{"apart", Kata, 0, 3}}; !slices.Equal(r.missesOf(probes), want) {
		t.Errorf("short: %v", r.missesOf(probes))
	}
	s := time.Second
	for _, c := range []struct {
		left time.Duration
		want []int
	}{{15 * s, nil}, {14 * s, []int{4}}, {9 * s, []int{4, 3}}, {7 * s, []int{4, 3, 2}}, {2 * s, []int{4, 3, 2, 1}}, {0, []int{4, 3, 2, 1}}} {
		if got := tooMuch(probes, []time.Duration{1 * s, 3 * s, 4 * s, 2 * s, 5 * s}, c.left); !slices.Equal(got, c.want) {
			t.Errorf("%v: %v left out; want %v", c.left, got, c.want)
		}
	}
}

func TestPeers(t *testing.T) {
	p, err := ParsePeer("gvisor=io.containerd.runsc.v1")
	if err != nil || p != (Peer{Name: "gvisor", Runtime: "io.containerd.runsc.v1"}) {
		t.Errorf("%+v, %v", p, err)
	}
	o := Options{Version: "2.4", Peers: []Peer{p}}
	if got := o.runtimes(); !slices.Equal(got, []string{Kata, Runc, "gvisor"}) || o.plugin("gvisor") != p.Runtime {
		t.Errorf("runtimes %q, plugin %q", got, o.plugin("gvisor"))
	}
	want := "[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.peer-gvisor]\nruntime_type = \"io.containerd.runsc.v1\"\n"
	if got := peerHandlers(o); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if p, err = ParsePeer("gvisor=/opt/runsc"); err != nil || p != (Peer{"gvisor", runcPlugin, "/opt/runsc"}) {
		t.Errorf("%+v, %v", p, err)
	}
	o.Peers = []Peer{p}
	if got := o.runFlags("gvisor", "--rm"); !slices.Equal(got, []string{"--runc-binary", "/opt/runsc", "--rm"}) {
		t.Errorf("flags %q", got)
	}
	if got := o.runFlags(Runc, "--rm"); !slices.Equal(got, []string{"--rm"}) {
		t.Errorf("flags %q of runc", got)
	}
	if got := peerHandlers(o); !strings.HasSuffix(got, ".peer-gvisor.options]\nBinaryName = \"/opt/runsc\"\n") {
		t.Errorf("got\n%s", got)
	}
	for _, bad := range []string{"", "x", "x=", "=y", "X=y", "runc=io.containerd.runc.v2", `x=a"b`} {
		if _, err := ParsePeer(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}
