// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/hypervisor"
)

// hugePools has a directory for each size of huge pages of the host (kernel
// Documentation/ABI/testing/sysfs-kernel-mm-hugepages).
const hugePools = "/sys/kernel/mm/hugepages"

// checkHugePages refuses a machine for which the host has not enough huge pages now,
// under the pool directory given. QEMU's own words for it name no cause.
func checkHugePages(c *hypervisor.Config, pools string) error {
	if !c.HugePages {
		return nil
	}
	if c.Memory != nil {
		return fmt.Errorf("a machine that is saved or restored has its memory in a file of its own, not in huge pages (HugePages): %w", errdefs.ErrInvalidArgument)
	}
	if c.MemoryBytes%hypervisor.HugePage != 0 {
		return fmt.Errorf("MemoryBytes is %d: must be a multiple of a huge page, %d bytes: %w", c.MemoryBytes, hypervisor.HugePage, errdefs.ErrInvalidArgument)
	}
	dir := filepath.Join(pools, fmt.Sprintf("hugepages-%dkB", hypervisor.HugePage>>10))
	count := func(file string) int64 {
		text, _ := os.ReadFile(filepath.Join(dir, file))
		n, _ := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		return n // none, if the kernel has no such pages
	}
	// Those that are promised to somebody are not free; more may be made up to the overcommit.
	free := count("free_hugepages") - count("resv_hugepages") + max(0, count("nr_overcommit_hugepages")-count("surplus_hugepages"))
	if need := int64(c.MemoryBytes / hypervisor.HugePage); free < need {
		return fmt.Errorf("the guest needs %d huge pages of %d kB, this host has %d to spare; reserve more (sysctl vm.nr_hugepages) or set hypervisor.qemu.enable_hugepages = false: %w",
			need, hypervisor.HugePage>>10, max(0, free), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// backing is what a memory back-end of this machine has beside its size: where its
// pages come from, and whether they are taken at once. Huge pages always are, since a
// guest that touches one that is not there ends with SIGBUS. Memory that comes later
// is promised by nobody; QEMU takes it when it is plugged in.
func backing(c hypervisor.Config, later bool) string {
	var s string
	if c.HugePages {
		s += fmt.Sprintf(",hugetlb=on,hugetlbsize=%dM", hypervisor.HugePage>>20)
	}
	switch {
	case !c.HugePages && !c.Prealloc:
	case later:
		s += ",reserve=off"
	default:
		s += ",prealloc=on"
	}
	return s
}

// smallPages keeps transparent huge pages from a VMM that emulates the guest's CPU:
// its buffer for translated code and its tables are used here and there, and by a
// half at best, and no guest gains by them. The setting is this process's and goes to all that it
// starts (PR_SET_THP_DISABLE, prctl(2)). With KVM they make the guest faster.
func (s *start) smallPages() {
	if s.l.Accelerator != TCG {
		return
	}
	if err := unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0); err != nil { // only larger without
		s.h.o.Log.Warn("transparent huge pages stay on", "error", err)
	}
}
