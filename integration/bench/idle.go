// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"time"

	"github.com/kata-v2/kata/internal/procstat"
)

// idleTime is how long the CPU use of an idle pod is watched, in all.
const idleTime = 60 * time.Second

// idle measures how much of one core an idle pod's processes use. The samples
// are equal, adjoining parts of idleTime.
func (e *Env) idle() Probe {
	rows := []Row{{"idle-cpu", Kata, Percent}, {"idle-cpu", Runc, Percent}, {"vmm-idle-cpu", Kata, Percent}}
	return Probe{Rows: rows, Apart: true, Takes: idleTime + 15*time.Second, Take: func(ctx context.Context, add Add) error {
		discard := func(Row, float64) {}
		return e.withContainer(ctx, Runc, Row{}, discard, func(runcID string) error {
			return e.withContainer(ctx, Kata, Row{}, discard, func(kataID string) error {
				if err := pause(ctx, settleTime); err != nil {
					return err
				}
				kata, err := e.processes(kataID, Kata)
				if err != nil {
					return err
				}
				runc, err := e.processes(runcID, Runc)
				if err != nil {
					return err
				}
				return watchCPU(ctx, idleTime, e.o.N, []int{kata.shim, runc.shim, kata.vmm}, func(i int, percent float64) { add(rows[i], percent) })
			})
		})
	}}
}

// watchCPU gives, for each of n equal parts of total and each process, the CPU
// time used in per cent of one core.
func watchCPU(ctx context.Context, total time.Duration, n int, pids []int, add func(i int, percent float64)) error {
	before, at, err := readCPU(pids)
	if err != nil {
		return err
	}
	for range n {
		if err := pause(ctx, total/time.Duration(n)); err != nil {
			return err
		}
		now, when, err := readCPU(pids)
		if err != nil {
			return err
		}
		for i := range pids {
			add(i, 100*float64(now[i]-before[i])/float64(when.Sub(at)))
		}
		before, at = now, when
	}
	return nil
}

func readCPU(pids []int) ([]time.Duration, time.Time, error) {
	used := make([]time.Duration, len(pids))
	for i, pid := range pids {
		var err error
		if used[i], err = procstat.CPUTime(pid); err != nil {
			return nil, time.Time{}, err
		}
	}
	return used, time.Now(), nil
}
