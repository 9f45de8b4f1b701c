// SPDX-License-Identifier: Apache-2.0

//go:build race

package vsock_test

// The race detector makes bulk data ten times slower and finds nothing in it:
// two of the four ring layouts and less of everything do.
const raceEnabled = true
