// SPDX-License-Identifier: Apache-2.0

package tsc

// counter is RDTSC, after everything before it (Intel SDM vol. 2, RDTSC).
func counter() uint64
