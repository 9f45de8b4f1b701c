// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"testing"

	"golang.org/x/sys/unix"
)

// An emulated machine's VMM has no transparent huge pages, others are as the host says.
func TestSmallPages(t *testing.T) {
	off := func() int {
		v, err := unix.PrctlRetInt(unix.PR_GET_THP_DISABLE, 0, 0, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	if err := unix.Prctl(unix.PR_SET_THP_DISABLE, 0, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	for accel, want := range map[string]int{KVM: 0, TCG: 1} {
		s := &start{h: New(Options{}), l: layout{Accelerator: accel}}
		s.smallPages()
		if got := off(); got != want {
			t.Errorf("%s: transparent huge pages are off: %d, want %d", accel, got, want)
		}
		if err := unix.Prctl(unix.PR_SET_THP_DISABLE, 0, 0, 0, 0); err != nil {
			t.Fatal(err)
		}
	}
}
