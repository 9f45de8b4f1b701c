// SPDX-License-Identifier: Apache-2.0

// Package soak lives pods' lives at random: several at once, through the CRI and by
// ctr, with containers that end, are asked, filled, updated, killed and removed at
// any moment, beside busy loops, while parts of pods are killed. Every call must
// return within its limit and say what is wrong if something is, exits must be
// those that the programs made, and nothing may be left on the machine.
//
// It is run by hand, for as long as there is time; one seed gives one order of
// actions, though not of what they meet:
//
//	go run ./integration/cmd/soak -for 4m -handler kata -busy 2 -kill
package soak
