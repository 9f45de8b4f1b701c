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
	// Most bounds the number of samples of what takes minutes, 0 for no bound. With
	// fewer than MinSamples the rows have no ratios.
	Most int
	// Takes is about how long all samples take of what has no warm-up, on an idle machine
	// without KVM; for Options.Budget.
	Takes time.Duration
	// Asked says that the probe runs only when -only names one of its rows.
	Asked bool
}

// wants tells whether a probe measures one of the names; no names means all.
func (p Probe) wants(names []string) bool {
	if len(names) == 0 {
		return !p.Asked
	}
	return slices.ContainsFunc(p.Rows, func(r Row) bool { return slices.Contains(names, r.Name) })
}

// failure is what a report says about the probe when a sample failed.
func (p Probe) failure(err error) Failure {
	f := Failure{Error: err.Error()}
	for _, r := range p.Rows {
		f.Rows = append(f.Rows, r.Name+"/"+r.Runtime)
	}
	return f
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
	var wanted []string
	for _, n := range names {
		from, derived := derivedFrom(n)
		switch {
		case slices.Contains(known, n):
			wanted = append(wanted, n)
		case derived:
			wanted = append(wanted, from...)
		default:
			slices.Sort(known)
			return nil, fmt.Errorf("bench: -only %q: want one of %q", n, slices.Compact(known))
		}
	}
	if len(wanted) > 0 {
		wanted = append([]string{BaseRow}, wanted...)
	}
	return slices.DeleteFunc(slices.Clone(probes), func(p Probe) bool { return !p.wants(wanted) }), nil
}

// runner collects samples.
type runner struct {
	n        int
	progress io.Writer
	// samples may hold those of an earlier part of the run.
	samples map[Row][]float64
	failed  map[int]Failure       // by the probe's place
	took    map[int]time.Duration // of the last sample, by the probe's place
	skipped map[int]bool          // left out for want of time, by the probe's place
	// until is when no further sample is begun; the zero time is never.
	until time.Time
	// save is called whenever something was added; nil for not at all.
	save func() error
}

// want is the number of samples of a probe.
func (r *runner) want(p Probe) int {
	if p.Most > 0 {
		return min(r.n, p.Most)
	}
	return r.n
}

// have is how many samples every row of a probe has.
func (r *runner) have(p Probe) int {
	least := r.n
	for _, row := range p.Rows {
		least = min(least, len(r.samples[row]))
	}
	return least
}

// late tells whether the run's time is over.
func (r *runner) late() bool { return !r.until.IsZero() && time.Now().After(r.until) }

// run takes n samples of every probe, round by round. A probe of which a sample
// fails is left out from there on and has no figures; only the end of ctx ends
// the run.
func (r *runner) run(ctx context.Context, probes []Probe) error {
	if r.samples == nil {
		r.samples = map[Row][]float64{}
	}
	r.failed, r.took = map[int]Failure{}, map[int]time.Duration{}
	r.begin(probes)
	fmt.Fprintln(r.progress, "warm-up, discarded")
	for i, p := range probes {
		// What is apart measures a state, not a first time, and what takes minutes has none to spare.
		if p.Apart || p.Most > 0 || r.have(p) >= r.want(p) || r.late() {
			continue
		}
		began := time.Now()
		if err := r.note(ctx, i, p, "warm-up", p.Take(ctx, func(Row, float64) {})); err != nil {
			return err
		}
		r.took[i] = time.Since(began)
		fmt.Fprintf(r.progress, "%-18s %6.1f s\n", p.Rows[0].Name+"/"+p.Rows[0].Runtime, r.took[i].Seconds())
	}
	for round := range r.n {
		if round > 0 { // a warm-up takes longer: it makes what the samples need
			r.fitBudget(probes)
		}
		began, took := time.Now(), 0
		for i, p := range probes {
			if _, failed := r.failed[i]; failed || r.skipped[i] || p.Apart || r.have(p) > round || round >= r.want(p) || r.late() {
				continue
			}
			took++
			begin := time.Now()
			if err := r.note(ctx, i, p, fmt.Sprintf("round %d", round+1), r.take(ctx, p, 1)); err != nil {
				return err
			}
			r.took[i] = time.Since(begin)
		}
		if took > 0 {
			fmt.Fprintf(r.progress, "round %d of %d      %6.1f s\n", round+1, r.n, time.Since(began).Seconds())
		}
	}
	return r.runApart(ctx, probes)
}

// begin makes the rows of a probe equally long: the last part may have ended
// between two of them.
func (r *runner) begin(probes []Probe) {
	for _, p := range probes {
		n := min(r.have(p), r.want(p))
		if p.Apart && n < r.want(p) {
			n = 0 // these samples come together
		}
		for _, row := range p.Rows {
			r.samples[row] = r.samples[row][:n]
		}
	}
}

func (r *runner) runApart(ctx context.Context, probes []Probe) error {
	for i, p := range probes {
		if !p.Apart || r.skipped[i] || r.have(p) >= r.want(p) || r.late() {
			continue
		}
		began := time.Now()
		if err := r.note(ctx, i, p, "apart", r.take(ctx, p, r.want(p))); err != nil {
			return err
		}
		fmt.Fprintf(r.progress, "%-18s %6.1f s\n", p.Rows[0].Name, time.Since(began).Seconds())
	}
	return nil
}

// note remembers a probe's failure, throws away what it had, and saves. It
// returns only what ends the run.
func (r *runner) note(ctx context.Context, i int, p Probe, when string, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("bench: %s: %w", p.Rows[0].Name, context.Cause(ctx))
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", when, err)
		fmt.Fprintf(r.progress, "%s failed: %v\n", p.Rows[0].Name, err)
		r.failed[i] = p.failure(err)
		for _, row := range p.Rows {
			delete(r.samples, row)
		}
	}
	if r.save == nil {
		return nil
	}
	return r.save()
}

// complete tells whether every probe has its samples.
func (r *runner) complete(probes []Probe) bool {
	return !slices.ContainsFunc(probes, func(p Probe) bool { return r.have(p) < r.want(p) })
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
	}
	if len(got) > len(p.Rows) {
		for row := range got {
			if !slices.Contains(p.Rows, row) {
				return fmt.Errorf("%s: samples of %s/%s, which is not one of the probe's rows", p.Rows[0].Name, row.Name, row.Runtime)
			}
		}
	}
	for _, row := range p.Rows {
		r.samples[row] = append(r.samples[row], got[row]...)
	}
	return nil
}

// results are the rows in the order of the probes, with those that are made of
// them, compared with each other.
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
	out = append(out, derive(out)...)
	slices.SortStableFunc(out, func(a, b Result) int { return place[a.Name] - place[b.Name] })
	compare(out)
	return out
}

// failures are those of the run, in the order of the probes.
func (r *runner) failures(probes []Probe) []Failure {
	var out []Failure
	for i := range probes {
		if f, failed := r.failed[i]; failed {
			out = append(out, f)
		}
	}
	return out
}
