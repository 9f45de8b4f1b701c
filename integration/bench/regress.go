// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
)

// Tolerance is how much a median may change before it counts.
const Tolerance = 0.10

// The verdicts of WriteComparison.
const (
	worse   = "WORSE"
	better  = "better"
	same    = ""
	tooFew  = "too few samples"
	notBoth = "in one file only"
)

// change is one row in two files.
type change struct {
	old, now Result
	// ratio is now's median divided by old's; low and high are what it is at least
	// and at most, by the quartiles of both. toBase is the ratio for a duration
	// divided by that of BaseRow, 0 where that is not in both.
	ratio, low, high, toBase float64
	verdict                  string
}

// WriteComparison prints the rows of a run beside those of an earlier one and
// returns how many became worse: by more than Tolerance, and so that the middle
// halves of both samples do not meet. A duration must be worse as such and
// measured by the bare boot, so that a slower machine is no regression. Rows of
// fewer than MinSamples get no verdict.
func WriteComparison(w io.Writer, base, now *Report) (regressions int, err error) {
	var b strings.Builder
	for _, name := range sameFacts {
		if was, is := base.fact(name), now.fact(name); was != is {
			fmt.Fprintf(&b, "%s: %s → %s\n", name, orNone(was), orNone(is))
		}
	}
	grid := [][]string{{"name", "runtime", "unit", "base", "now", "ratio", "from–to", "by " + BaseRow, "verdict"}}
	for _, c := range changes(base.Results, now.Results) {
		line := []string{c.now.Name, c.now.Runtime, string(c.now.Unit), "", "", "", "", "", c.verdict}
		if c.old.N > 0 {
			line[3] = number(c.old.Median)
		}
		if c.now.N > 0 {
			line[4] = number(c.now.Median)
		}
		if c.ratio > 0 {
			line[5], line[6] = twoDecimals(c.ratio), twoDecimals(c.low)+"–"+twoDecimals(c.high)
		}
		if c.toBase > 0 {
			line[7] = twoDecimals(c.toBase)
		}
		if c.verdict == worse {
			regressions++
		}
		grid = append(grid, line)
	}
	b.WriteString(align(grid))
	fmt.Fprintf(&b, "\n%s worse by more than %g %% with spreads apart\n", count(regressions), 100*Tolerance)
	_, err = io.WriteString(w, b.String())
	return regressions, err
}

func orNone(s string) string {
	if s == "" {
		return "not told"
	}
	return s
}

func count(n int) string {
	if n == 1 {
		return "1 row is"
	}
	return strconv.Itoa(n) + " rows are"
}

// changes pairs the measured rows, in the order of now, then those that only old has.
func changes(old, now []Result) []change {
	bare := changeOf(find(old, Row{Name: BaseRow, Runtime: Bare}), find(now, Row{Name: BaseRow, Runtime: Bare}), 0)
	var out []change
	for _, r := range now {
		if r.From == "" {
			out = append(out, changeOf(find(old, r.Row()), r, bare.ratio))
		}
	}
	for _, r := range old {
		if r.From == "" && find(now, r.Row()).N == 0 {
			c := change{old: r, verdict: notBoth}
			c.now.Name, c.now.Runtime, c.now.Unit = r.Name, r.Runtime, r.Unit
			out = append(out, c)
		}
	}
	return out
}

// find is the result of a row, whatever its unit; the zero Result if there is none.
func find(results []Result, row Row) Result {
	i := slices.IndexFunc(results, func(r Result) bool { return r.Name == row.Name && r.Runtime == row.Runtime })
	if i < 0 {
		return Result{}
	}
	return results[i]
}

// changeOf judges one row; bare is the change of BaseRow, 0 if that is not known.
func changeOf(old, now Result, bare float64) change {
	c := change{old: old, now: now, verdict: notBoth}
	if old.N == 0 || now.N == 0 || old.Unit != now.Unit {
		return c
	}
	// A file has one size; everything else has to be measured often.
	if min(old.N, now.N) < MinSamples && now.Unit != Megabytes {
		c.verdict = tooFew
		return c
	}
	ol, oh := quartiles(old.Samples)
	nl, nh := quartiles(now.Samples)
	if old.Median > 0 && ol > 0 {
		c.ratio, c.low, c.high = now.Median/old.Median, nl/oh, nh/ol
	}
	measures := []float64{c.ratio}
	if bare > 0 && now.Unit == Milliseconds && now.Name != BaseRow {
		c.toBase = c.ratio / bare
		measures = append(measures, c.toBase)
	}
	up := slices.Min(measures) > 1+Tolerance && nl > oh
	if c.ratio == 0 {
		up = nl > oh+1 // nothing can be divided by zero: one unit counts
	}
	down := c.ratio > 0 && slices.Max(measures) < 1-Tolerance && nh < ol
	if now.Unit.higherIsBetter() {
		up, down = down, up
	}
	switch {
	case up:
		c.verdict = worse
	case down:
		c.verdict = better
	default:
		c.verdict = same
	}
	return c
}
