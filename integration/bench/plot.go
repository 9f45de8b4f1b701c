// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/xml"
	"fmt"
	"math"
	"slices"
	"strings"
)

// The plot's measures, in pixels.
const (
	plotWidth  = 960
	plotLabels = 250 // of the names, left of the axis
	plotValues = 150 // of the numbers, right of it
	plotLine   = 15  // one bar
	plotGap    = 7   // between names
	plotHead   = 34  // above a panel's bars
	plotTop    = 40
)

// The plot's colours, readable beside each other also in grey; other runtimes
// take the last ones in turn.
var plotColours = map[string]string{Kata: "#1f6f8b", Runc: "#e0a030", Bare: "#8c8c8c"}

var peerColours = []string{"#9c4f96", "#4f8a3c", "#c0504d"}

// panel is the part of the plot for one unit.
type panel struct {
	title    string
	results  []Result
	low, top float64 // of the axis, powers of ten
}

var panelTitles = []struct {
	unit  Unit
	title string
}{
	{Milliseconds, "Time, ms (less is better)"},
	{Mebibytes, "Memory, MiB (less is better)"},
	{Percent, "Share, % (less is better)"},
	{Megabytes, "Size, MB (less is better)"},
	{MegabytesPerSecond, "Rate, MB/s (more is better)"},
	{PerSecond, "Rate, operations/s (more is better)"},
}

// SVG draws the results: for each row a bar to the median on a logarithmic axis,
// a dot for each sample and a line from the least to the greatest. The same
// results give the same bytes.
func SVG(results []Result) []byte {
	panels := makePanels(results)
	colours := chooseColours(results)
	height := plotTop
	for _, p := range panels {
		height += p.height()
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="11">`+"\n", plotWidth, height+10, plotWidth, height+10)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#ffffff"/>`+"\n", plotWidth, height+10)
	legend(&b, results, colours)
	y := plotTop
	for _, p := range panels {
		p.draw(&b, y, colours)
		y += p.height()
	}
	b.WriteString("</svg>\n")
	return []byte(b.String())
}

// makePanels sorts what was measured by unit. A row made of others would be the same bar twice.
func makePanels(results []Result) []panel {
	var out []panel
	for _, t := range panelTitles {
		p := panel{title: t.title}
		low, top := math.Inf(1), math.Inf(-1)
		for _, r := range results {
			if r.Unit != t.unit || r.From != "" {
				continue
			}
			p.results = append(p.results, r)
			for _, v := range append([]float64{r.Median}, r.Samples...) {
				if v > 0 {
					low, top = min(low, v), max(top, v)
				}
			}
		}
		if len(p.results) == 0 {
			continue
		}
		if math.IsInf(low, 1) {
			low, top = 1, 1 // nothing but zeros
		}
		p.low, p.top = math.Pow(10, math.Floor(math.Log10(low))), math.Pow(10, math.Ceil(math.Log10(top)))
		if p.low == p.top {
			p.top *= 10
		}
		out = append(out, p)
	}
	return out
}

func chooseColours(results []Result) map[string]string {
	out := map[string]string{}
	next := 0
	for _, r := range results {
		if out[r.Runtime] != "" {
			continue
		}
		if out[r.Runtime] = plotColours[r.Runtime]; out[r.Runtime] == "" {
			out[r.Runtime] = peerColours[next%len(peerColours)]
			next++
		}
	}
	return out
}

func (p panel) height() int {
	h := plotHead + plotGap
	for i, r := range p.results {
		h += plotLine
		if i == 0 || p.results[i-1].Name != r.Name {
			h += plotGap
		}
	}
	return h
}

// x is where a value is; what is below the axis, zero too, is at its beginning.
func (p panel) x(v float64) float64 {
	if v <= p.low {
		return plotLabels
	}
	width := float64(plotWidth - plotLabels - plotValues)
	return plotLabels + width*math.Log10(v/p.low)/math.Log10(p.top/p.low)
}

func (p panel) draw(b *strings.Builder, y int, colours map[string]string) {
	bottom := y + p.height() - plotGap
	fmt.Fprintf(b, `<text x="10" y="%d" font-weight="bold">%s</text>`+"\n", y+14, escape(p.title))
	for v := p.low; v <= p.top*1.0001; v *= 10 {
		fmt.Fprintf(b, `<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#dddddd"/>`+"\n", p.x(v), y+plotHead-4, p.x(v), bottom)
		fmt.Fprintf(b, `<text x="%.1f" y="%d" fill="#777777" text-anchor="middle">%g</text>`+"\n", p.x(v), y+plotHead-8, math.Round(v*1e6)/1e6)
	}
	at := y + plotHead
	for i, r := range p.results {
		if i == 0 || p.results[i-1].Name != r.Name {
			at += plotGap
			fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n", plotLabels-8, at+11, escape(r.Name))
		}
		p.bar(b, at, r, colours[r.Runtime])
		at += plotLine
	}
}

// bar draws one row.
func (p panel) bar(b *strings.Builder, at int, r Result, colour string) {
	fmt.Fprintf(b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`+"\n", plotLabels, at+2, max(p.x(r.Median)-plotLabels, 1), plotLine-4, colour)
	middle := float64(at) + plotLine/2.0
	fmt.Fprintf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="#222222"/>`+"\n", p.x(r.Min), middle, p.x(r.Max), middle)
	if r.N > 1 {
		for _, v := range r.Samples {
			fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="1.8" fill="#222222"/>`+"\n", p.x(v), middle)
		}
	}
	fmt.Fprintf(b, `<text x="%.1f" y="%d">%s</text>`+"\n", p.x(max(r.Max, r.Median))+6, at+11, escape(fmt.Sprintf("%s %s, n=%d", r.Runtime, number(r.Median), r.N)))
}

// legend names the colours.
func legend(b *strings.Builder, results []Result, colours map[string]string) {
	x := 10
	var seen []string
	for _, r := range results {
		if slices.Contains(seen, r.Runtime) {
			continue
		}
		seen = append(seen, r.Runtime)
		fmt.Fprintf(b, `<rect x="%d" y="12" width="11" height="11" fill="%s"/><text x="%d" y="22">%s</text>`+"\n", x, colours[r.Runtime], x+16, escape(r.Runtime))
		x += 36 + 7*len(r.Runtime)
	}
	fmt.Fprintf(b, `<text x="%d" y="22" fill="#777777">bar: median; dots: samples; line: least to greatest; logarithmic</text>`+"\n", x)
}

func escape(s string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(s)) // a strings.Builder takes everything
	return b.String()
}
