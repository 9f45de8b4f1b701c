// SPDX-License-Identifier: Apache-2.0

// Package tsc measures the rate of this machine's time stamp counter. An
// emulated guest reads the same counter (QEMU's TCG answers RDTSC with the host's)
// but finds its rate by a timer that is emulated as well, while other work takes the
// CPU away between two readings: seen was a clock that ran ten times too fast.
package tsc

import "time"

// measured is the shortest time that a rate is measured over: two readings, each
// off by some 100 ns at most, give 20 parts in a million.
const measured = 10 * time.Millisecond

// What a rate may be, in kHz; anything else is no counter of time.
const (
	leastKHz = 100_000
	mostKHz  = 20_000_000
)

// reading is the counter's value at a time.
type reading struct {
	at    time.Time
	ticks uint64
}

// began is the first reading of this process.
var began = read()

// tries are made for each reading, since the process may be interrupted in one.
const tries = 8

// read takes the reading of which time and counter are closest to each other.
func read() (best reading) {
	closest := ^uint64(0)
	for range tries {
		before := counter()
		at := time.Now()
		if gap := counter() - before; gap < closest {
			best, closest = reading{at, before + gap/2}, gap
		}
	}
	return best
}

// KHz is the counter's rate in kHz, measured since the process began; 0 where
// there is no such counter. It waits only in the first 10 ms.
func KHz() uint64 {
	if wait := measured - time.Since(began.at); wait > 0 {
		time.Sleep(wait) // the measurement itself, not the wait for an event
	}
	return rate(began, read())
}

func rate(a, b reading) uint64 {
	us := b.at.Sub(a.at).Microseconds()
	if us <= 0 || b.ticks <= a.ticks {
		return 0
	}
	khz := uint64(float64(b.ticks-a.ticks) / float64(b.at.Sub(a.at)) * float64(time.Millisecond))
	if khz < leastKHz || khz > mostKHz {
		return 0
	}
	return khz
}
