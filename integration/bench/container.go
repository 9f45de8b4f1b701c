// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/kata-v2/kata/integration/lab"
)

// settleTime is how long a pod has been up, idle, when its memory is read.
const settleTime = 5 * time.Second

// logTimeout bounds the wait for the shim's line about a start, which reaches
// containerd's log on a path of its own.
const logTimeout = 5 * time.Second

// coldStartRow is a container's whole life with `ctr run`.
const coldStartRow = "cold-start"

// deleteRow is the removal of a running container.
const deleteRow = "delete"

// podPSS is the memory of all processes that an idle container has on the host.
const podPSS = "pod-pss"

// phasesRow is the whole of a start as the shim sees it; its parts are rows of
// this name with a dot and the part's name.
const phasesRow = "start-phases"

// coldStart measures `ctr run --rm` of true, from the start of the command to
// its exit, and with Kata the parts of the start.
func (e *Env) coldStart(runtime string) Probe {
	row := Row{coldStartRow, runtime, Milliseconds}
	rows := []Row{row}
	if runtime == Kata {
		rows = append(rows, Row{phasesRow, Kata, Milliseconds})
		for _, name := range e.phases {
			rows = append(rows, phaseRow(name))
		}
	}
	return Probe{Rows: rows, Take: func(ctx context.Context, add Add) error {
		id := e.id()
		took, err := e.ctr(ctx, e.c.RunArgs(e.o.plugin(runtime), id, e.o.runFlags(runtime, "--rm"), "true")...)
		if err != nil {
			return err
		}
		add(row, milliseconds(took))
		if runtime != Kata {
			return nil
		}
		phases, err := e.startPhases(ctx, id)
		if err != nil {
			return err
		}
		var sum time.Duration
		for _, p := range phases {
			sum += p.Time
			add(phaseRow(p.Name), milliseconds(p.Time))
		}
		add(Row{phasesRow, Kata, Milliseconds}, milliseconds(sum))
		return nil
	}}
}

func phaseRow(name string) Row {
	return Row{phasesRow + "." + strings.TrimPrefix(name, "t_"), Kata, Milliseconds}
}

// startPhases reads the parts of a container's start from the shim's line.
func (e *Env) startPhases(ctx context.Context, id string) ([]lab.Phase, error) {
	ctx, cancel := context.WithTimeout(ctx, logTimeout)
	defer cancel()
	line, err := e.c.WaitLog(ctx, func(line string) bool {
		return lab.Started(line) && strings.Contains(line+" ", " container="+id+" ")
	})
	if err != nil {
		return nil, fmt.Errorf("the shim's line about the start of %s: %w", id, err)
	}
	return lab.Phases(line)
}

// pod measures what one idle container costs and how it answers: memory
// settleTime after its start, the first exec in it and a later one, and its removal.
func (e *Env) pod(runtime string) Probe {
	var (
		shim   = Row{"shim-pss", runtime, Mebibytes}
		vmm    = Row{"vmm-pss", runtime, Mebibytes}
		fsd    = Row{"virtiofsd-pss", runtime, Mebibytes}
		total  = Row{podPSS, runtime, Mebibytes}
		first  = Row{"exec-first", runtime, Milliseconds}
		exec   = Row{"exec", runtime, Milliseconds}
		remove = Row{deleteRow, runtime, Milliseconds}
	)
	rows := []Row{exec, first, remove, shim}
	if runtime == Kata {
		rows = append(rows, vmm, fsd, total)
	}
	return Probe{Rows: rows, Take: func(ctx context.Context, add Add) error {
		return e.withContainer(ctx, runtime, remove, add, func(id string) error {
			if err := pause(ctx, settleTime); err != nil {
				return err
			}
			p, err := e.processes(id, runtime)
			if err != nil {
				return err
			}
			groups := map[Row][]int{shim: {p.shim}}
			if runtime == Kata {
				groups[vmm], groups[fsd] = []int{p.vmm}, p.virtiofsd
				groups[total] = append([]int{p.shim, p.vmm}, p.virtiofsd...)
			}
			for row, pids := range groups {
				v, err := pss(pids...)
				if err != nil {
					return err
				}
				add(row, v)
			}
			for _, row := range []Row{first, exec} {
				took, err := e.ctr(ctx, "tasks", "exec", "--fifo-dir", e.c.FIFODir(), "--exec-id", row.Name, id, "true")
				if err != nil {
					return err
				}
				add(row, milliseconds(took))
			}
			return nil
		})
	}}
}

// withContainer runs f beside an idle container of the runtime and removes that
// in any case; the time of the task's removal is a sample of the row remove.
func (e *Env) withContainer(ctx context.Context, runtime string, remove Row, add Add, f func(id string) error) error {
	id := e.id()
	if _, err := e.ctr(ctx, e.c.RunArgs(e.o.plugin(runtime), id, e.o.runFlags(runtime, "--detach"), "sleep", "1000000")...); err != nil {
		return err
	}
	err := f(id)
	// An interrupt ends the measurement, not the clean-up, which is bounded by itself.
	ctx = context.WithoutCancel(ctx)
	took, taskErr := e.ctr(ctx, "tasks", "rm", "--force", id)
	_, containerErr := e.ctr(ctx, "containers", "rm", id)
	if err = errors.Join(err, taskErr, containerErr); err == nil {
		add(remove, milliseconds(took))
	}
	return err
}

// processes are those of an idle container; one of Kata must have a VMM.
func (e *Env) processes(id, runtime string) (podProcesses, error) {
	pids, err := e.c.Processes()
	if err != nil {
		return podProcesses{}, err
	}
	p, err := findPod(pids, id)
	if err == nil && runtime == Kata && p.vmm == 0 {
		err = fmt.Errorf("the shim %d of container %s has no QEMU process", p.shim, id)
	}
	return p, err
}

// pause waits for d or until ctx is done.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
