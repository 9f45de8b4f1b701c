// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"math"
	"slices"
)

// Unit is what the numbers of a row count.
type Unit string

// The units.
const (
	Milliseconds Unit = "ms"
	Mebibytes    Unit = "MiB"
	Percent      Unit = "%"  // of one core, or of what a row names
	Megabytes    Unit = "MB" // 1,000,000 bytes of a file
	// MegabytesPerSecond are 1,000,000 bytes of a stream in one second.
	MegabytesPerSecond Unit = "MB/s"
	// PerSecond are operations in one second.
	PerSecond Unit = "/s"
)

// higherIsBetter tells of a rate.
func (u Unit) higherIsBetter() bool { return u == MegabytesPerSecond || u == PerSecond }

// Row names one line of the table.
type Row struct {
	Name, Runtime string
	Unit          Unit
}

// Result is a row with its samples; its JSON form is what other programs read.
type Result struct {
	Name    string  `json:"name"`
	Runtime string  `json:"runtime"`
	N       int     `json:"n"`
	Median  float64 `json:"median"`
	Min     float64 `json:"min"`
	Max     float64 `json:"max"`
	Unit    Unit    `json:"unit"`
	// Samples are in the order in which they were taken.
	Samples []float64 `json:"samples"`
	// VS are this row's median divided by another's: by BaseRow's for durations,
	// for Kata by that of every other runtime under the same name, and for stdio by
	// that of the raw stream. Only rows with MinSamples and more are compared.
	VS map[string]float64 `json:"vs"`
	// Spread is for each of VS the lower and the upper quartile of the ratios of
	// single rounds.
	Spread map[string][2]float64 `json:"vs_spread"`
	// From names the rows that this one was made of; empty for what was measured.
	From string `json:"from,omitempty"`
}

// Row is what the result is about.
func (r Result) Row() Row { return Row{r.Name, r.Runtime, r.Unit} }

// summarize computes everything but the ratios; samples is not empty.
func summarize(r Row, samples []float64) Result {
	sorted := slices.Sorted(slices.Values(samples))
	n := len(sorted)
	median := sorted[n/2]
	if n%2 == 0 {
		median = (sorted[n/2-1] + sorted[n/2]) / 2
	}
	return Result{
		Name: r.Name, Runtime: r.Runtime, Unit: r.Unit, N: n,
		Median: round(median), Min: round(sorted[0]), Max: round(sorted[n-1]),
		Samples: each(samples, round), VS: map[string]float64{}, Spread: map[string][2]float64{},
	}
}

// round keeps four decimals: more than any of the clocks is good for, and the
// file stays readable.
func round(v float64) float64 { return math.Round(v*1e4) / 1e4 }

func each(in []float64, f func(float64) float64) []float64 {
	out := make([]float64, len(in))
	for i, v := range in {
		out[i] = f(v)
	}
	return out
}

// quartiles are the values that a quarter of the samples, rounded down, is below
// and above.
func quartiles(samples []float64) (low, high float64) {
	sorted := slices.Sorted(slices.Values(samples))
	k := len(sorted) / 4
	return sorted[k], sorted[len(sorted)-1-k]
}

// compare fills VS and Spread of every result.
func compare(results []Result) {
	for i := range results {
		r := &results[i]
		for _, other := range results {
			if key := reference(*r, other); key != "" && ratioAllowed(*r, other) {
				r.VS[key] = round(r.Median / other.Median)
				low, high := ratioSpread(r.Samples, other.Samples)
				r.Spread[key] = [2]float64{round(low), round(high)}
			}
		}
	}
}

// ratioSpread is the middle half of a's samples divided by those of b that are of
// the same round; of all ways to pair them if the rounds are not the same.
func ratioSpread(a, b []float64) (low, high float64) {
	if len(a) == len(b) && !slices.Contains(b, 0) {
		ratios := make([]float64, len(a))
		for i := range a {
			ratios[i] = a[i] / b[i]
		}
		return quartiles(ratios)
	}
	al, ah := quartiles(a)
	bl, bh := quartiles(b)
	if bl <= 0 {
		bl = bh
	}
	return al / bh, ah / bl
}

// reference is the key under which r is compared with other, empty for not at all.
func reference(r, other Result) string {
	switch {
	case r.Unit != other.Unit || r.Name == BaseRow:
		return ""
	case other.Name == BaseRow:
		return BaseRow
	case r.Runtime == Bare:
		return ""
	case r.Name == other.Name && r.Runtime == Kata && other.Runtime != Kata && other.Runtime != Bare:
		return other.Runtime
	case r.Name == other.Name && r.Runtime == Kata && other.Runtime == Bare:
		return bareKey(other)
	case r.Name == stdioOut && r.Runtime == Kata && other.Name == vsockUp, r.Name == stdioIn && r.Runtime == Kata && other.Name == vsockDown:
		return other.Name
	case r.Runtime == Kata && other.Runtime == Kata && references[r.Name] == other.Name:
		return other.Name
	}
	return ""
}

// bareKey is what a ratio to the bare machine is called: by BaseRow's name there
// is one already where the figure is that of one boot.
func bareKey(bare Result) string {
	if bare.From == BaseRow+"/"+Bare {
		return ""
	}
	return Bare
}

// references are what rows of Kata are compared with beside other runtimes.
var references = map[string]string{
	firstByte + "100": firstByte + "1", firstByte + "30": firstByte + "1", diskRead: diskReadRaw, diskMetadata: shareMetadata,
	"disk-create": "share-create", "disk-stat": "share-stat", "disk-unlink": "share-unlink", "disk-copy": "share-copy",
}

func ratioAllowed(r, other Result) bool {
	return r.N >= MinSamples && other.N >= MinSamples && other.Median > 0
}
