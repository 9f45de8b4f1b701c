// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"errors"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"
)

// TestReserveCID: what the kernel says decides. The kernel's own answers are
// seen by integration/vhost.
func TestReserveCID(t *testing.T) {
	taken := map[uint64]bool{}
	set := func(cid uint64) error {
		if cid < 3 || cid >= unix.VMADDR_CID_ANY {
			t.Errorf("context id %d is reserved", cid)
		}
		if taken[cid] {
			return unix.EADDRINUSE
		}
		taken[cid] = true
		return nil
	}
	few := func(uint32) uint32 { return rand.Uint32N(2) }
	a, err := reserveCID(few, set)
	if err != nil {
		t.Fatal(err)
	}
	b, err := reserveCID(few, set) // draws the one that is taken sooner or later
	if err != nil || a == b {
		t.Fatalf("context ids %d and %d, %v", a, b, err)
	}
	if _, err := reserveCID(few, set); err == nil {
		t.Error("a third context id of two")
	}
	for _, edge := range []func(uint32) uint32{func(uint32) uint32 { return 5 }, func(n uint32) uint32 { return n - 1 }} {
		if _, err := reserveCID(edge, set); err != nil {
			t.Error(err)
		}
	}
	if _, err := reserveCID(few, func(uint64) error { return unix.EPERM }); !errors.Is(err, unix.EPERM) {
		t.Errorf("refused by the kernel: %v", err)
	}
}
