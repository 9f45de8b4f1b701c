// SPDX-License-Identifier: Apache-2.0

package bench

// stdioRow is the slower direction of a program's streams.
const stdioRow = "stdio"

// derivation makes a row of others: of rows of one other name and runtime, or of
// the lesser sample of two names.
type derivation struct {
	name string
	// from are the names that it is made of.
	from []string
	// runtime and fromRuntime are "" for any, which is the same for both.
	runtime, fromRuntime string
}

// derivations give the names of the product's figures to what they are compared
// with, where that was measured under another name in the same run: nothing is
// measured twice.
var derivations = []derivation{
	{stdioRow, []string{stdioOut, stdioIn}, "", ""},
	{stdioRow, []string{vsockUp, vsockDown}, Bare, Kata},
	{cloneStart, []string{coldStartRow}, "", ""}, // other runtimes have one way to start
	{cloneStart, []string{BaseRow}, Bare, Bare},
	{restoreRow, []string{BaseRow}, Bare, Bare},
	{podStart, []string{BaseRow}, Bare, Bare},
	{podsAtOnce(4), []string{bareAtOnce(4)}, Bare, Bare},
	{podsAtOnce(16), []string{bareAtOnce(16)}, Bare, Bare},
	{clonesAtOnceRow(4), []string{bareAtOnce(4)}, Bare, Bare},
	{clonesAtOnceRow(16), []string{bareAtOnce(16)}, Bare, Bare},
	{clonePSS, []string{podPSS}, "", ""},
}

// derivedFrom are the names that rows of a name are made of besides being measured.
func derivedFrom(name string) (names []string, ok bool) {
	for _, d := range derivations {
		if d.name == name {
			names, ok = append(names, d.from...), true
		}
	}
	return names, ok
}

// derive makes the rows of the derivations whose parts are there, those of other
// runtimes only beside Kata's. A row that was measured itself, and Kata's under a
// name that stands for something else, are left alone.
func derive(results []Result) []Result {
	at := map[Row]Result{}
	for _, r := range results {
		at[Row{Name: r.Name, Runtime: r.Runtime}] = r
	}
	var out []Result
	for _, d := range derivations {
		for _, first := range results {
			target := d.runtime
			if target == "" {
				target = first.Runtime
			}
			if first.Name != d.from[0] || d.fromRuntime != "" && first.Runtime != d.fromRuntime {
				continue
			}
			_, measured := at[Row{Name: d.name, Runtime: target}]
			_, kata := at[Row{Name: d.name, Runtime: Kata}]
			if measured || target == Kata && d.name != stdioRow || target != Kata && !kata {
				continue
			}
			samples := append([]float64(nil), first.Samples...)
			from := first.Name + "/" + first.Runtime
			for _, name := range d.from[1:] {
				other, there := at[Row{Name: name, Runtime: first.Runtime}]
				if !there {
					samples = nil
					break
				}
				samples = lesser(samples, other.Samples)
				from += ", " + name + "/" + other.Runtime
			}
			if len(samples) == 0 {
				continue
			}
			r := summarize(Row{d.name, target, first.Unit}, samples)
			r.From = from
			at[Row{Name: d.name, Runtime: target}] = r
			out = append(out, r)
		}
	}
	return out
}

// lesser are the smaller ones of each pair.
func lesser(a, b []float64) []float64 {
	out := make([]float64, min(len(a), len(b)))
	for i := range out {
		out[i] = min(a[i], b[i])
	}
	return out
}
