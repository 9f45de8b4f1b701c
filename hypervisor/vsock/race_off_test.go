// SPDX-License-Identifier: Apache-2.0

//go:build !race

package vsock_test

const raceEnabled = false
