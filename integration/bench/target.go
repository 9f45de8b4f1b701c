// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"slices"
	"strings"
)

// target is a figure to reach: the median of Kata's row of a name, or its ratio
// to a reference, is at most – of rates: at least – the bound.
type target struct {
	name string
	// against is a key of Result.VS; empty for the median itself.
	against string
	bound   float64
}

// targets are what this repository sets out to reach, without KVM.
var targets = []target{
	{coldStartRow, BaseRow, 1.2},
	{"exec", BaseRow, 0.1},
	{cloneShim, "", 12},
	{"idle-cpu", "", 0.1},
	{shimSizeRow, "", 13},
	{guestRootSizeRow, "", 16},
	{vsockUp, "", 100},
	{vsockDown, "", 100},
	{stdioOut, vsockUp, 0.5},
	{stdioIn, vsockDown, 0.5},
	{stdioRow, Bare, 0.5},
	{exitEvent, "", 50},
	{killExit, "", 100},
	{podStart, BaseRow, 1.3},
	{podFurther, BaseRow, 0.4},
	{podDelete, BaseRow, 0.3},
	{podsAtOnce(16), Bare, 1.3},
	{cloneStart, BaseRow, 0.35},
	{cloneStart, "gvisor", 1},
	{restoreRow, BaseRow, 0.12},
	{clonePSS, "", 60},
	{firstByte + "100", firstByte + "1", 1.3},
	{diskRead, diskReadRaw, 0.8},
	{diskMetadata, shareMetadata, 0.2},
	{diskAttach, "", 150},
	{volumeSync, "", 200},
	{memoryKept, "", 5},
	{memoryFreed, "", 15},
}

// judge says of each target whether the results reach it. Too few samples are no verdict.
func judge(results []Result) string {
	var b strings.Builder
	for _, t := range targets {
		i := slices.IndexFunc(results, func(r Result) bool { return r.Name == t.name && r.Runtime == Kata })
		if i < 0 {
			continue
		}
		r := results[i]
		got, unit := r.Median, " "+string(r.Unit)
		// A file has one size; everything else has to be measured often.
		ok := r.N >= MinSamples || r.Unit == Megabytes
		if t.against != "" {
			got, ok = r.VS[t.against]
			unit = " × " + t.against
		}
		verdict, limit, missed := "reached", "most", got > t.bound
		if r.Unit.higherIsBetter() {
			limit, missed = "least", got < t.bound
		}
		switch {
		case !ok && t.against == "gvisor":
			continue // a peer that is not installed
		case !ok && r.N >= MinSamples:
			fmt.Fprintf(&b, "%-16s at %s %g%s: no verdict without %d samples of that\n", t.name, limit, t.bound, unit, MinSamples)
			continue
		case !ok:
			fmt.Fprintf(&b, "%-16s at %s %g%s: no verdict from %d samples, fewer than %d\n", t.name, limit, t.bound, unit, r.N, MinSamples)
			continue
		case missed:
			verdict = "missed"
		}
		fmt.Fprintf(&b, "%-16s at %s %g%s: %s with %.4g\n", t.name, limit, t.bound, unit, verdict, got)
	}
	return b.String()
}
