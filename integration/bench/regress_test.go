// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// around are seven samples of a value; the outer ones are a tenth away.
func around(v float64) []float64 { return []float64{0.9 * v, v, v, v, v, 1.02 * v, 1.1 * v} }

func report(rows map[Row][]float64, order ...Row) *Report {
	r := &Report{Complete: true}
	for _, row := range order {
		if s := rows[row]; len(s) > 0 {
			r.Results = append(r.Results, summarize(row, s))
		}
	}
	compare(r.Results)
	return r
}

func TestComparison(t *testing.T) {
	bare, start := Row{BaseRow, Bare, Milliseconds}, Row{"cold-start", Kata, Milliseconds}
	rate, few := Row{"vsock-up", Kata, MegabytesPerSecond}, Row{"exec", Kata, Milliseconds}
	idle, gone, size := Row{"idle-cpu", Kata, Percent}, Row{"delete", Kata, Milliseconds}, Row{"shim-size", Kata, Megabytes}
	order := []Row{bare, start, rate, few, idle, gone, size}
	base := report(map[Row][]float64{bare: around(100), start: around(200), rate: around(50), few: {1, 2, 3}, idle: make([]float64, 7), gone: around(9), size: {10}}, order...)
	base.Facts = []Fact{{"guest kernel", "6.1"}}
	now := report(map[Row][]float64{bare: around(100), start: around(300), rate: around(40), few: {9, 9, 9}, idle: around(5), size: {8}}, order...)
	now.Facts = []Fact{{"guest kernel", "6.12"}}
	var b strings.Builder
	n, err := WriteComparison(&b, base, now)
	if err != nil {
		t.Fatal(err)
	}
	want := `guest kernel: 6.1 → 6.12
name        runtime  unit    base   now  ratio    from–to  by bare-boot  verdict
bare-boot   bare     ms       100   100   1.00  0.98–1.02
cold-start  kata     ms       200   300   1.50  1.47–1.53          1.50  WORSE
vsock-up    kata     MB/s    50.0  40.0   0.80  0.78–0.82                WORSE
exec        kata     ms       2.0   9.0                                  too few samples
idle-cpu    kata     %     0.0000   5.0                                  WORSE
shim-size   kata     MB      10.0   8.0   0.80  0.80–0.80                better
delete      kata     ms       9.0                                        in one file only

3 rows are worse by more than 10 % with spreads apart
`
	if n != 3 || b.String() != want {
		t.Errorf("%d regressions:\n%s\nwant 3:\n%s", n, b.String(), want)
	}
}

// TestSlowerMachine: what is slower with everything else is no regression, nor is what scatters.
func TestSlowerMachine(t *testing.T) {
	bare, start := Row{BaseRow, Bare, Milliseconds}, Row{"cold-start", Kata, Milliseconds}
	for name, now := range map[string]map[Row][]float64{
		"all slower": {bare: around(200), start: around(400)},
		"scattered":  {bare: around(100), start: {150, 199, 190, 300, 300, 400, 500}},
	} {
		base := report(map[Row][]float64{bare: around(100), start: around(200)}, bare, start)
		for _, c := range changes(base.Results, report(now, bare, start).Results) {
			if c.now.Name != BaseRow && c.verdict != same {
				t.Errorf("%s: %s is %s", name, c.now.Name, c.verdict)
			}
		}
	}
}

func TestReadFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "b.json")
	for text, want := range map[string]string{
		"no JSON":                    "b.json",
		`{"results":[{"name":"a"}]}`: "a/ has no samples",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadFile(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %q", text, err, want)
		}
	}
	if _, err := ReadFile(path + "x"); err == nil {
		t.Error("a file that is not there was read")
	}
}

func TestDerived(t *testing.T) {
	results := []Result{
		summarize(Row{BaseRow, Bare, Milliseconds}, around(100)),
		summarize(Row{"cold-start", Kata, Milliseconds}, around(200)),
		summarize(Row{"cold-start", Runc, Milliseconds}, around(20)),
		summarize(Row{cloneStart, Kata, Milliseconds}, around(50)),
		summarize(Row{stdioOut, Kata, MegabytesPerSecond}, []float64{10, 20, 30}),
		summarize(Row{stdioIn, Kata, MegabytesPerSecond}, []float64{11, 19, 31}),
		summarize(Row{stdioOut, Runc, MegabytesPerSecond}, []float64{99}),
	}
	got := map[string]string{}
	all := append(results, derive(results)...)
	for _, r := range all[len(results):] {
		got[r.Name+"/"+r.Runtime] = r.From
	}
	want := map[string]string{
		"stdio/kata": "stdio-out/kata, stdio-in/kata", "clone-start/runc": "cold-start/runc",
		"clone-start/bare": "bare-boot/bare",
	}
	if len(got) != len(want) {
		t.Errorf("derived %v; want %v", got, want)
	}
	for name, from := range want {
		if got[name] != from {
			t.Errorf("%s is from %q; want %q", name, got[name], from)
		}
	}
	compare(all)
	if vs := find(all, Row{Name: cloneStart, Runtime: Kata}).VS; len(vs) != 2 || vs[BaseRow] != 0.5 || vs[Runc] != 2.5 {
		t.Errorf("a clone's ratios %v; want those to the bare boot and to runc's start", vs)
	}
	if s := find(all, Row{Name: stdioRow, Runtime: Kata}).Samples; s[0] != 10 || s[1] != 19 || s[2] != 30 {
		t.Errorf("stdio %v; want the slower direction of each round", s)
	}
}

func TestSVG(t *testing.T) {
	results := []Result{
		summarize(Row{BaseRow, Bare, Milliseconds}, around(100)),
		summarize(Row{"cold <start>", Kata, Milliseconds}, around(2000)),
		summarize(Row{"cold <start>", "peer", Milliseconds}, around(20)),
		summarize(Row{"idle-cpu", Kata, Percent}, []float64{0, 0, 0}),
		{Name: "made", Runtime: Runc, Unit: Milliseconds, N: 1, Median: 1, Samples: []float64{1}, From: "x"},
	}
	svg := SVG(results)
	if !bytes.Equal(svg, SVG(results)) {
		t.Error("the same results give different drawings")
	}
	if err := wellFormed(svg); err != nil {
		t.Errorf("%v:\n%s", err, svg)
	}
	text := string(svg)
	for _, want := range []string{"cold &lt;start&gt;", "Time, ms", "Share, %", "kata 2000, n=7", ">10<", ">10000<", plotColours[Kata], peerColours[0]} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing", want)
		}
	}
	if strings.Contains(text, ">made<") || strings.Contains(text, "NaN") || strings.Contains(text, "Inf") {
		t.Error("a row made of others is drawn, or a number is none")
	}
	if err := wellFormed(SVG(nil)); err != nil {
		t.Error(err)
	}
}

// TestPlotAxis: a value's place is by its logarithm, between the panel's powers of ten.
func TestPlotAxis(t *testing.T) {
	p := makePanels([]Result{summarize(Row{"a", Kata, Milliseconds}, []float64{20, 3000})})[0]
	const width = plotWidth - plotLabels - plotValues
	if p.low != 10 || p.top != 10000 || p.x(0) != plotLabels || p.x(10) != plotLabels || p.x(10000) != plotLabels+width || math.Abs(p.x(100)-plotLabels-width/3.0) > 1e-9 {
		t.Errorf("axis %v to %v: 0 at %v, 100 at %v, 10000 at %v", p.low, p.top, p.x(0), p.x(100), p.x(10000))
	}
}

func wellFormed(svg []byte) error {
	d := xml.NewDecoder(bytes.NewReader(svg))
	for {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}
