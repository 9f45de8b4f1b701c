// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/internal/kvmprobe"
	"github.com/kata-v2/kata/internal/procstat"
	"github.com/kata-v2/kata/sandbox/ledger"
)

const mib = 1 << 20

// What the parts of a pod need at most beside the guest's memory, as docs/bench
// has measured them (shim-pss, virtiofsd-pss, vmm-pss without the guest's pages).
const (
	shimOverhead      = 16 * mib
	virtiofsdOverhead = 8 * mib
	vmmOverhead       = 48 * mib
	// translated is QEMU's buffer of translated code, without KVM (hypervisor/qemu, tb-size).
	translated = 128 * mib
	// plannedCPU is for the VMM's threads of I/O and the shim while a pod works, in
	// thousandths of a CPU; an idle pod uses less than three.
	plannedCPU = 100
)

// Overhead is what "kata-ctl overhead" prints: the resources that a pod takes beside
// those of its containers.
type Overhead struct {
	// Source says what the numbers are from.
	Source string `json:"source"`
	// Parts are the memory in bytes, by what has it.
	Parts []OverheadPart `json:"parts"`
	// Memory is their sum, in bytes, rounded up to a MiB; CPUMillis are thousandths of a CPU.
	Memory    int64 `json:"memory_bytes"`
	CPUMillis int64 `json:"cpu_millis"`
}

// OverheadPart is one part of the memory.
type OverheadPart struct {
	Name  string `json:"name"`
	Bytes int64  `json:"bytes"`
}

// newOverhead is the command.
func newOverhead(o *options) *cobra.Command {
	var running bool
	window := 10 * time.Second
	c := command("overhead", "Print what a pod takes beside its containers, as a RuntimeClass states it", o, func(o *options, ctx context.Context, w io.Writer) error {
		return o.overhead(ctx, w, running, window)
	})
	c.Flags().BoolVar(&running, "running", false, "measure the pods that run on this host, which should be idle, instead of planning by the configuration")
	c.Flags().DurationVar(&window, "window", window, "how long their CPU time is watched")
	return c
}

func (o *options) overhead(ctx context.Context, w io.Writer, running bool, window time.Duration) error {
	var h Overhead
	if running {
		root, err := o.stateRoot()
		if err != nil {
			return err
		}
		if h, err = runningOverhead(ctx, root, window); err != nil {
			return err
		}
	} else {
		c, _, err := o.load()
		if err != nil {
			return err
		}
		if h, err = o.plannedOverhead(ctx, c); err != nil {
			return err
		}
	}
	if o.json {
		return printJSON(w, h)
	}
	_, err := io.WriteString(w, h.snippet())
	return err
}

// plannedOverhead is what the pods of a configuration may come to need: the pod's
// cgroup must hold all of the guest's memory, or a pod that stays within its
// limits is ended all the same.
func (o *options) plannedOverhead(ctx context.Context, c *config.Config) (Overhead, error) {
	vmm := OverheadPart{"QEMU", vmmOverhead}
	emulated := c.QEMU.Accelerator == "tcg"
	if c.QEMU.Accelerator == "auto" {
		v, err := kvmprobe.Probe(ctx, o.host.kvm)
		if err != nil && ctx.Err() != nil {
			return Overhead{}, ctx.Err()
		}
		emulated = err != nil || !v.Usable
	}
	if emulated {
		vmm = OverheadPart{"QEMU without KVM", vmmOverhead + translated}
	}
	h := Overhead{Source: "the configuration: what a pod may come to need", CPUMillis: plannedCPU, Parts: []OverheadPart{
		{"guest memory at boot (default_memory)", int64(c.QEMU.DefaultMemory) * mib}, vmm, {"shim", shimOverhead},
	}}
	if c.QEMU.SharedFS != "none" {
		h.Parts = append(h.Parts, OverheadPart{"virtio-fs daemon", virtiofsdOverhead})
	}
	h.sum()
	return h, nil
}

// runningOverhead is the most that one of the running pods has in memory, by part,
// and the most CPU time that one uses.
func runningOverhead(ctx context.Context, root string, window time.Duration) (Overhead, error) {
	list, err := ledger.List(root)
	if err != nil {
		return Overhead{}, err
	}
	most := map[string]int64{}
	var order []string
	var pods [][]int
	for _, i := range list {
		if !i.Alive || i.Err != nil {
			continue
		}
		groups := podProcesses(i)
		var all []int
		for _, g := range groups {
			n, err := procstat.PSS(g.pids...)
			if err != nil {
				return Overhead{}, fmt.Errorf("pod %s: %w", i.Meta.Sandbox, err)
			}
			if _, known := most[g.name]; !known {
				order = append(order, g.name)
			}
			most[g.name] = max(most[g.name], n)
			all = append(all, g.pids...)
		}
		pods = append(pods, all)
	}
	if len(pods) == 0 {
		return Overhead{}, errors.New("no pod runs on this host: start an idle one, or leave --running out to plan by the configuration")
	}
	h := Overhead{Source: fmt.Sprintf("%d running pods of this host, the largest of each part; what their containers use is in it", len(pods))}
	for _, name := range order {
		h.Parts = append(h.Parts, OverheadPart{name, most[name]})
	}
	if h.CPUMillis, err = busiest(ctx, pods, window); err != nil {
		return Overhead{}, err
	}
	h.sum()
	return h, nil
}

// processGroup are the processes of one name.
type processGroup struct {
	name string
	pids []int
}

// podProcesses are the live processes of a pod, the shim first.
func podProcesses(i ledger.Info) []processGroup {
	groups := []processGroup{{"shim", []int{i.Meta.Shim.PID}}}
	for _, e := range i.Entries {
		if e.Kind != ledger.KindProcess {
			continue
		}
		if start, err := ledger.StartTime(e.PID); err != nil || start != e.Start {
			continue
		}
		at := -1
		for k, g := range groups {
			if g.name == e.Name {
				at = k
			}
		}
		if at < 0 {
			groups, at = append(groups, processGroup{name: e.Name}), len(groups)
		}
		groups[at].pids = append(groups[at].pids, e.PID)
	}
	return groups
}

// busiest is the CPU time that the busiest pod uses in a window, in thousandths of a CPU.
func busiest(ctx context.Context, pods [][]int, window time.Duration) (int64, error) {
	if window <= 0 {
		return 0, fmt.Errorf("--window %s: want more than none", window)
	}
	before, err := cpuTimes(pods)
	if err != nil {
		return 0, err
	}
	began := time.Now()
	timer := time.NewTimer(window)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	after, err := cpuTimes(pods)
	if err != nil {
		return 0, err
	}
	took, most := time.Since(began), time.Duration(0)
	for i := range pods {
		most = max(most, after[i]-before[i])
	}
	// A RuntimeClass counts whole thousandths; none at all would be a lie.
	return max(1, int64((most*1000+took-1)/took)), nil
}

func cpuTimes(pods [][]int) ([]time.Duration, error) {
	out := make([]time.Duration, len(pods))
	for i, pids := range pods {
		for _, pid := range pids {
			t, err := procstat.CPUTime(pid)
			if err != nil {
				return nil, fmt.Errorf("a pod ended while it was watched: %w", err)
			}
			out[i] += t
		}
	}
	return out, nil
}

func (h *Overhead) sum() {
	h.Memory = 0
	for _, p := range h.Parts {
		h.Memory += p.Bytes
	}
	h.Memory = (h.Memory + mib - 1) / mib * mib
}

// snippet is the part of a RuntimeClass (node.k8s.io/v1).
func (h Overhead) snippet() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# From %s.\n", h.Source)
	for _, p := range h.Parts {
		fmt.Fprintf(&b, "#   %-38s %4d MiB\n", p.Name, (p.Bytes+mib-1)/mib)
	}
	fmt.Fprintf(&b, "overhead:\n  podFixed:\n    memory: %dMi\n    cpu: %dm\n", h.Memory/mib, h.CPUMillis)
	return b.String()
}
