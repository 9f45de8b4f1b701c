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

// The rows of pods that start from a template.
const (
	cloneStart = "clone-start" // `ctr run --rm` of true
	restoreRow = "restore"     // from the start of QEMU until the guest's agent answers
	clonePSS   = "clone-pss"   // of all processes of an idle clone beside clonesAtOnce-1 others
	cloneShim  = "clone-shim-pss"
)

// clonesAtOnce is how many clones there are while their memory is measured.
const clonesAtOnce = 16

// cloneEnv is the bench on a containerd whose pods start from a template, as they
// do by default; it is there before the first of them. Call it once; the caller ends it.
func (e *Env) cloneEnv(ctx context.Context) (*Env, error) {
	c, err := lab.Start(ctx, lab.Options{
		Version: e.o.Version, ShimDir: e.o.Bin, Snapshotter: e.o.Snapshotter, CRI: true, ExtraConfig: peerHandlers(e.o),
		Kata: &lab.Kata{Images: e.o.Images, Set: map[string]string{
			"factory.enable_template": "true",
			// 64 that start at one time on two cores take more than the 45 and 60 s that one may.
			"agent.kata.dial_timeout": "300", "agent.kata.launch_process_timeout": "300", "runtime.create_container_timeout": "300",
		}},
	})
	if err != nil {
		return nil, err
	}
	cloned := &Env{o: e.o, c: c, dir: e.dir}
	var out string
	if out, err = c.KataCtl(ctx, "template", "init"); err != nil {
		err = fmt.Errorf("bench: template: %w: %s", err, out)
	} else {
		cloned.cri, err = cloned.connectCRI(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, c.Stop(context.WithoutCancel(ctx)))
	}
	return cloned, nil
}

// clones returns cloneEnv's result, the same every time.
func (e *Env) clones(ctx context.Context) (*Env, error) {
	if e.cloned == nil {
		c, err := e.cloneEnv(ctx)
		if err != nil {
			return nil, err
		}
		e.cloned = c
	}
	return e.cloned, nil
}

// stopClones ends what clones made.
func (e *Env) stopClones(ctx context.Context) error {
	if e.cloned == nil {
		return nil
	}
	return errors.Join(e.cloned.cri.Close(ctx), e.cloned.c.Stop(ctx))
}

// cloneStart measures a pod's whole life from a template, and its restore alone.
func (e *Env) cloneStart() Probe {
	start, restore := Row{cloneStart, Kata, Milliseconds}, Row{restoreRow, Kata, Milliseconds}
	return Probe{Rows: []Row{start, restore}, Take: func(ctx context.Context, add Add) error {
		c, err := e.clones(ctx)
		if err != nil {
			return err
		}
		id := c.id()
		took, err := c.ctr(ctx, c.c.RunArgs(e.o.plugin(Kata), id, []string{"--rm"}, "true")...)
		if err != nil {
			return err
		}
		restored, err := c.restoreTime(ctx, id)
		if err != nil {
			return err
		}
		add(start, milliseconds(took))
		add(restore, milliseconds(restored))
		return nil
	}}
}

// restoreTime reads how long a clone took to answer from the shim's line.
func (e *Env) restoreTime(ctx context.Context, id string) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, logTimeout)
	defer cancel()
	line, err := e.c.WaitLog(ctx, func(line string) bool {
		return strings.Contains(line, " msg=cloned ") && strings.Contains(line, " sandbox="+id+" ")
	})
	if err != nil {
		return 0, fmt.Errorf("the shim's line about the clone %s: %w", id, err)
	}
	_, rest, _ := strings.Cut(line, " t_restore=")
	value, _, _ := strings.Cut(rest, " ")
	return time.ParseDuration(value)
}

// cloneMemory measures what a clone costs beside others: pages that they share
// count for each in equal parts.
func (e *Env) cloneMemory() Probe {
	pod, shim := Row{clonePSS, Kata, Mebibytes}, Row{cloneShim, Kata, Mebibytes}
	return Probe{Rows: []Row{pod, shim}, Apart: true, Takes: 40 * time.Second, Take: func(ctx context.Context, add Add) error {
		c, err := e.clones(ctx)
		if err != nil {
			return err
		}
		var measure func(ids []string) error
		measure = func(ids []string) error {
			if len(ids) < max(clonesAtOnce, e.o.N) {
				return c.withContainer(ctx, Kata, Row{}, func(Row, float64) {}, func(id string) error { return measure(append(ids, id)) })
			}
			if err := pause(ctx, settleTime); err != nil {
				return err
			}
			for _, id := range ids[:e.o.N] {
				p, err := c.processes(id, Kata)
				if err != nil {
					return err
				}
				all, err := pss(append([]int{p.shim, p.vmm}, p.virtiofsd...)...)
				if err != nil {
					return err
				}
				own, err := pss(p.shim)
				if err != nil {
					return err
				}
				add(pod, all)
				add(shim, own)
			}
			return nil
		}
		return measure(nil)
	}}
}
