// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Unit is what the numbers of a row count.
type Unit string

// The units.
const (
	Milliseconds Unit = "ms"
	Mebibytes    Unit = "MiB"
	Percent      Unit = "%"  // of one core
	Megabytes    Unit = "MB" // 1,000,000 bytes of a file
	// MegabytesPerSecond are 1,000,000 bytes of a stream in one second.
	MegabytesPerSecond Unit = "MB/s"
)

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
}

// summarize computes everything but VS; samples is not empty.
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
		Samples: each(samples, round), VS: map[string]float64{},
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

// compare fills VS of every result.
func compare(results []Result) {
	for i := range results {
		r := &results[i]
		for _, other := range results {
			if key := reference(*r, other); key != "" && ratioAllowed(*r, other) {
				r.VS[key] = round(r.Median / other.Median)
			}
		}
	}
}

// reference is the key under which r is compared with other, empty for not at all.
func reference(r, other Result) string {
	switch {
	case r.Unit != other.Unit || r.Name == BaseRow:
		return ""
	case other.Name == BaseRow:
		return BaseRow
	case r.Name == other.Name && r.Runtime == Kata && other.Runtime != Kata:
		return other.Runtime
	case other.Runtime == Bare && r.Runtime == Kata && sameCrowd(r.Name, other.Name):
		return other.Name
	case r.Name == stdioOut && other.Name == vsockUp, r.Name == stdioIn && other.Name == vsockDown:
		return other.Name
	case r.Runtime == Kata && other.Runtime == Kata && diskReference[r.Name] == other.Name:
		return other.Name
	}
	return ""
}

// diskReference is what rows of root filesystems are compared with beside runc.
var diskReference = map[string]string{
	firstByte + "100": firstByte + "1", firstByte + "30": firstByte + "1", diskRead: diskReadRaw, diskMetadata: shareMetadata,
}

// sameCrowd tells whether two rows are of the same number of pods and of bare
// machines at one time.
func sameCrowd(pods, bare string) bool {
	a, isPods := strings.CutPrefix(pods, podsRow)
	b, isBare := strings.CutPrefix(bare, BaseRow+"-")
	return isPods && isBare && a == b
}

func ratioAllowed(r, other Result) bool {
	return r.N >= MinSamples && other.N >= MinSamples && other.Median > 0
}

// WriteJSON writes {"results": […]} to path, whole or not at all.
func WriteJSON(path string, results []Result) error {
	b, err := json.MarshalIndent(struct {
		Results []Result `json:"results"`
	}{results}, "", "  ")
	if err != nil {
		return fmt.Errorf("bench: results: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("bench: results: %w", err)
	}
	tmp := path + ".tmp"
	defer os.Remove(tmp)
	if err := os.WriteFile(tmp, append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("bench: results: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("bench: results: %w", err)
	}
	return nil
}
