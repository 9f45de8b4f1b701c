// SPDX-License-Identifier: Apache-2.0

// Package bench measures what the promises of this repository are about: how
// long a container in a virtual machine takes to start, to run one more program
// and to end, and what an idle one costs – against the bare machine (the same
// kernel, QEMU and machine type with nothing in it) and against runc, in one run.
//
// A Probe takes one sample of each of its rows per round. The rounds go over all
// probes in turn, so that a disturbance of the machine hits all rows alike, and
// only medians of the same run are divided by each other:
//
//	set-up      the private containerd, the image, one discarded turn of every probe
//	round 1…n   every probe that is not apart, in order
//	then        the probes that are apart (they need a machine at rest), n samples each
//	end         everything is removed; what is left behind is an error
//
// To add a measurement, write a Probe and add it to Probes: its rows appear in
// the table and in the file by themselves. A probe with a failing sample has no
// figures, and the run fails at its end: a figure that leaves out failures is none.
package bench

// BaseRow is the row that every duration is compared with.
const BaseRow = "bare-boot"

// The runtimes that rows are about.
const (
	Bare = "bare" // no container: QEMU with a kernel and a tiny init
	Kata = "kata" // io.containerd.kata.v2
	Runc = "runc" // io.containerd.runc.v2
)

// MinSamples is the least number of samples that a ratio is made of.
const MinSamples = 7
