// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"slices"
)

// CPUThreads implements hypervisor.CPUThreader (QEMU qapi/machine.json, query-cpus-fast).
func (vm *VM) CPUThreads(ctx context.Context) ([]int, error) {
	var cpus []struct {
		Thread int `json:"thread-id"`
	}
	if err := vm.qmp.execute(ctx, "query-cpus-fast", nil, &cpus); err != nil {
		return nil, err
	}
	var tids []int
	for _, c := range cpus {
		if !slices.Contains(tids, c.Thread) { // one thread may run several
			tids = append(tids, c.Thread)
		}
	}
	return tids, nil
}
