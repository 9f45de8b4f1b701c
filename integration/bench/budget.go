// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Short is a row that has fewer samples than were asked for.
type Short struct {
	Name    string `json:"name"`
	Runtime string `json:"runtime"`
	N       int    `json:"n"`
	Want    int    `json:"want"`
}

// missesOf are the rows of the probes without all their samples, but for failed ones.
func (r *runner) missesOf(probes []Probe) []Short {
	var out []Short
	for i, p := range probes {
		if _, failed := r.failed[i]; failed || r.have(p) >= r.want(p) {
			continue
		}
		for _, row := range p.Rows {
			out = append(out, Short{row.Name, row.Runtime, len(r.samples[row]), r.want(p)})
		}
	}
	return out
}

// fitBudget leaves out what there is no time for: seven samples of some rows are worth more
// than three of all, of which no ratio is given.
func (r *runner) fitBudget(probes []Probe) {
	if r.until.IsZero() {
		return
	}
	need := make([]time.Duration, len(probes))
	for i, p := range probes {
		_, failed := r.failed[i]
		switch missing := r.want(p) - r.have(p); {
		case failed || r.skipped[i] || missing <= 0:
		case p.Takes > 0:
			need[i] = p.Takes
		default:
			need[i] = time.Duration(missing) * r.took[i]
		}
	}
	for _, i := range tooMuch(probes, need, time.Until(r.until)) {
		if r.skipped == nil {
			r.skipped = map[int]bool{}
		}
		r.skipped[i] = true
		fmt.Fprintf(r.progress, "left out for want of time: %s, about %v\n", strings.Join(names(probes[i]), ", "), need[i].Round(time.Second))
	}
}

// tooMuch chooses probes so that what the others need is no more than there is: the last
// ones first, and those that a figure to reach is about only after all others.
func tooMuch(probes []Probe, need []time.Duration, left time.Duration) (out []int) {
	var sum time.Duration
	for _, d := range need {
		sum += d
	}
	for _, aimed := range []bool{false, true} {
		for i := len(probes) - 1; i >= 0 && sum > left; i-- {
			if need[i] > 0 && probes[i].aimedAt() == aimed && !slices.Contains(names(probes[i]), BaseRow) {
				out, sum = append(out, i), sum-need[i]
			}
		}
	}
	return out
}

// aimedAt tells whether a figure to reach is about one of the probe's rows.
func (p Probe) aimedAt() bool {
	return slices.ContainsFunc(targets, func(t target) bool {
		from, _ := derivedFrom(t.name)
		return slices.ContainsFunc(append(from, t.name, t.against), func(name string) bool { return slices.Contains(names(p), name) })
	})
}

// names are those of the probe's rows, each once.
func names(p Probe) (out []string) {
	for _, row := range p.Rows {
		if !slices.Contains(out, row.Name) {
			out = append(out, row.Name)
		}
	}
	return out
}

// shortages is what the table says of them.
func shortages(all []Short) string {
	var b strings.Builder
	for _, s := range all {
		fmt.Fprintf(&b, "not complete: %s/%s has %d of %d samples\n", s.Name, s.Runtime, s.N, s.Want)
	}
	return b.String()
}
