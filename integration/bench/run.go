// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"
)

// Add records one sample of a row of the probe.
type Add func(row Row, value float64)

// Probe is one stop of a round.
type Probe struct {
	// Rows are what the probe measures, in the order of the table. Every Take
	// gives exactly one sample of each.
	Rows []Row
	// Take takes the samples. It leaves nothing running behind it.
	Take func(ctx context.Context, add Add) error
	// Apart says that the probe wants the machine for itself: it is not part of
	// the rounds and takes all its samples after them, in one call.
	Apart bool
}

// wants tells whether a probe measures one of the names; no names means all.
func (p Probe) wants(names []string) bool {
	return len(names) == 0 || slices.ContainsFunc(p.Rows, func(r Row) bool { return slices.Contains(names, r.Name) })
}

// selectProbes keeps the probes for the names, and that of BaseRow with them. A
// name that no probe has is an error.
func selectProbes(probes []Probe, names []string) ([]Probe, error) {
	var known []string
	for _, p := range probes {
		for _, r := range p.Rows {
			known = append(known, r.Name)
		}
	}
	for _, n := range names {
		if !slices.Contains(known, n) {
			slices.Sort(known)
			return nil, fmt.Errorf("bench: -only %q: want one of %q", n, slices.Compact(known))
		}
	}
	if len(names) > 0 {
		names = append([]string{BaseRow}, names...)
	}
	return slices.DeleteFunc(slices.Clone(probes), func(p Probe) bool { return !p.wants(names) }), nil
}

// runner collects samples.
type runner struct {
	n        int
	progress io.Writer
	samples  map[Row][]float64
}

// run takes n samples of every probe, round by round.
func (r *runner) run(ctx context.Context, probes []Probe) error {
	r.samples = map[Row][]float64{}
	fmt.Fprintln(r.progress, "warm-up, discarded")
	for _, p := range probes {
		if p.Apart {
			continue // it measures a state, not a first time
		}
		if err := p.Take(ctx, func(Row, float64) {}); err != nil {
			return fmt.Errorf("bench: warm-up of %s: %w", p.Rows[0].Name, err)
		}
	}
	for i := range r.n {
		began := time.Now()
		for _, p := range probes {
			if p.Apart {
				continue
			}
			if err := r.take(ctx, p, 1); err != nil {
				return fmt.Errorf("bench: round %d: %w", i+1, err)
			}
		}
		fmt.Fprintf(r.progress, "round %d of %d      %6.1f s\n", i+1, r.n, time.Since(began).Seconds())
	}
	for _, p := range probes {
		if p.Apart {
			began := time.Now()
			if err := r.take(ctx, p, r.n); err != nil {
				return fmt.Errorf("bench: %w", err)
			}
			fmt.Fprintf(r.progress, "%-18s %6.1f s\n", p.Rows[0].Name, time.Since(began).Seconds())
		}
	}
	return nil
}

// take runs the probe and checks that it gave want more samples of each row and
// of no other.
func (r *runner) take(ctx context.Context, p Probe, want int) error {
	got := map[Row][]float64{}
	err := p.Take(ctx, func(row Row, v float64) { got[row] = append(got[row], v) })
	if err != nil {
		return fmt.Errorf("%s: %w", p.Rows[0].Name, err)
	}
	for _, row := range p.Rows {
		if len(got[row]) != want {
			return fmt.Errorf("%s: %d samples of %s/%s: want %d", p.Rows[0].Name, len(got[row]), row.Name, row.Runtime, want)
		}
		r.samples[row] = append(r.samples[row], got[row]...)
		delete(got, row)
	}
	for row := range got {
		return fmt.Errorf("%s: samples of %s/%s, which is not one of the probe's rows", p.Rows[0].Name, row.Name, row.Runtime)
	}
	return nil
}

// results are the rows in the order of the probes, compared with each other.
func (r *runner) results(probes []Probe) []Result {
	var out []Result
	place := map[string]int{} // rows of one name stand together, at the place of the first
	for _, p := range probes {
		for _, row := range p.Rows {
			if _, seen := place[row.Name]; !seen {
				place[row.Name] = len(place)
			}
			if s := r.samples[row]; len(s) > 0 {
				out = append(out, summarize(row, s))
			}
		}
	}
	slices.SortStableFunc(out, func(a, b Result) int { return place[a.Name] - place[b.Name] })
	compare(out)
	return out
}
