// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// densities are the numbers of idle pods at which the memory of one is measured.
var densities = []int{1, 8, 32}

// fewAtOnce are started at one time where the time does not matter.
const fewAtOnce = 4

// crowdTimeout bounds one start of many at one time.
const crowdTimeout = 5 * time.Minute

func clonesAtOnceRow(n int) string { return fmt.Sprintf("%s-%d", cloneStart, n) }

// cloneCrowd measures how long n containers take that are started at one time by
// `ctr run --detach`: clones, and those of the other runtimes.
func (e *Env) cloneCrowd(n int) Probe {
	var rows []Row
	for _, r := range e.o.runtimes() {
		rows = append(rows, Row{clonesAtOnceRow(n), r, Milliseconds})
	}
	p := Probe{Rows: rows, Take: func(ctx context.Context, add Add) error {
		c, err := e.clones(ctx)
		if err != nil {
			return err
		}
		for _, row := range rows {
			began := time.Now()
			var took time.Duration
			err := c.withMany(ctx, row.Runtime, n, func([]string) error { took = time.Since(began); return nil })
			if err != nil {
				return fmt.Errorf("%s: %w", row.Runtime, err)
			}
			add(row, milliseconds(took))
		}
		return nil
	}}
	if n > clonesAtOnce {
		p.Most, p.Takes = 1, 2*time.Minute
	}
	return p
}

// withMany runs f beside n idle containers, started at one time, and removes them in any case.
func (e *Env) withMany(ctx context.Context, runtime string, n int, f func(ids []string) error) error {
	return e.addMany(ctx, runtime, nil, n, f)
}

// addMany is withMany with some containers there already.
func (e *Env) addMany(ctx context.Context, runtime string, there []string, n int, f func(ids []string) error) error {
	ids := make([]string, n)
	for i := range ids {
		ids[i] = e.id()
	}
	started, err := all(n, func(i int) (bool, error) {
		_, err := e.ctrWithin(ctx, crowdTimeout, e.c.RunArgs(e.o.plugin(runtime), ids[i], e.o.runFlags(runtime, "--detach"), "sleep", "1000000")...)
		return err == nil, err
	})
	if err == nil {
		err = f(slices.Concat(there, ids))
	}
	// An interrupt ends the measurement, not the clean-up, which is bounded by itself.
	clean := context.WithoutCancel(ctx)
	// containerd gives each shim seconds to end, which is not enough for all at one time.
	turn := make(chan struct{}, fewAtOnce)
	_, rerr := all(n, func(i int) (struct{}, error) {
		if !started[i] {
			return struct{}{}, nil
		}
		turn <- struct{}{}
		defer func() { <-turn }()
		_, terr := e.ctrWithin(clean, crowdTimeout, "tasks", "rm", "--force", ids[i])
		_, cerr := e.ctr(clean, "containers", "rm", ids[i])
		return struct{}{}, errors.Join(terr, cerr)
	})
	return errors.Join(err, rerr)
}

// density measures the memory of an idle clone by the number of them, split by process.
func (e *Env) density() Probe {
	return e.densityOf("clone", func(ctx context.Context) (*Env, error) { return e.clones(ctx) })
}

// coldDensity is the same of pods that booted. Thirty-two of them take minutes
// to start without KVM, and 6 GiB.
func (e *Env) coldDensity() Probe {
	return e.densityOf("pod", func(context.Context) (*Env, error) { return e, nil })
}

func (e *Env) densityOf(kind string, on func(context.Context) (*Env, error)) Probe {
	parts := []struct {
		name string
		pids func(podProcesses) []int
	}{
		{"pss", func(p podProcesses) []int { return append([]int{p.shim, p.vmm}, p.virtiofsd...) }},
		{"shim-pss", func(p podProcesses) []int { return []int{p.shim} }},
		{"vmm-pss", func(p podProcesses) []int { return []int{p.vmm} }},
		{"virtiofsd-pss", func(p podProcesses) []int { return p.virtiofsd }},
	}
	row := func(part string, n int) Row { return Row{fmt.Sprintf("%s-%s-%d", kind, part, n), Kata, Mebibytes} }
	var rows []Row
	for _, n := range densities {
		for _, part := range parts {
			rows = append(rows, row(part.name, n))
		}
	}
	return Probe{Rows: rows, Apart: true, Most: 1, Takes: 2 * time.Minute, Take: func(ctx context.Context, add Add) error {
		c, err := on(ctx)
		if err != nil {
			return err
		}
		var step func(i int, ids []string) error
		step = func(i int, ids []string) error {
			if len(ids) < densities[i] {
				n := min(fewAtOnce, densities[i]-len(ids))
				return c.addMany(ctx, Kata, ids, n, func(ids []string) error { return step(i, ids) })
			}
			if err := pause(ctx, settleTime); err != nil {
				return err
			}
			for _, part := range parts {
				mean, err := c.meanPSS(ids, part.pids)
				if err != nil {
					return err
				}
				add(row(part.name, len(ids)), mean)
			}
			if i+1 >= len(densities) {
				return nil
			}
			return step(i+1, ids)
		}
		return step(0, nil)
	}}
}

// meanPSS is the memory of some processes of each container, divided by their number.
func (e *Env) meanPSS(ids []string, pids func(podProcesses) []int) (float64, error) {
	var sum float64
	for _, id := range ids {
		p, err := e.processes(id, Kata)
		if err != nil {
			return 0, err
		}
		v, err := pss(pids(p)...)
		if err != nil {
			return 0, err
		}
		sum += v
	}
	return sum / float64(len(ids)), nil
}
