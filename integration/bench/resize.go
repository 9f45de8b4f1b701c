// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/kata-v2/kata/internal/procstat"
)

// The rows of a pod that grows and shrinks, through the CRI.
const (
	memoryGrow   = "memory-grow"   // smallLimit to largeLimit: the call until its answer
	memoryShrink = "memory-shrink" // and back
	memoryKept   = "memory-kept"   // of what was added, the part that the guest still has after it
	memoryFreed  = "memory-freed"  // of what a program had and freed, the part that is not the host's after freedTime
	rssSmall     = "memory-rss-small"
	rssUsed      = "memory-rss-used" // at most, while a program fills what was added
	rssBack      = "memory-rss-back"
)

const (
	smallLimit = 256 << 20
	largeLimit = 1 << 30
	// freedBytes are what the program takes and frees at once.
	freedBytes = 512 << 20
	// freedTime is how long the host waits for them: the guest's kernel reports free
	// pages every two seconds (mm/page_reporting.c).
	freedTime = 10 * time.Second
)

// resize measures a pod whose container grows from 256 MiB to 1 GiB and back, and
// what of its memory is the host's.
func (e *Env) resize() Probe {
	ms := func(name string) Row { return Row{name, Kata, Milliseconds} }
	mib := func(name string) Row { return Row{name, Kata, Mebibytes} }
	part := func(name string) Row { return Row{name, Kata, Percent} }
	rows := []Row{ms(memoryGrow), ms(memoryShrink), part(memoryKept), part(memoryFreed), mib(rssSmall), mib(rssUsed), mib(rssBack)}
	return Probe{Rows: rows, Take: func(ctx context.Context, add Add) (err error) {
		p, err := e.startPodWith(ctx, e.id(), Kata, smallLimit, "sleep", "100000")
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, p.remove(context.WithoutCancel(ctx))) }()
		m := &resized{criPod: p}
		procs, err := e.processes(p.id, Kata)
		if err != nil {
			return err
		}
		m.vmm = procs.vmm
		return m.measure(ctx, add)
	}}
}

// resized is the pod under measurement.
type resized struct {
	*criPod
	vmm int
}

func (m *resized) measure(ctx context.Context, add Add) error {
	before, err := m.guestMemory(ctx)
	if err != nil {
		return err
	}
	small, err := statusMiB(m.vmm, "VmRSS")
	if err != nil {
		return err
	}
	grow, err := m.limit(ctx, largeLimit)
	if err != nil {
		return err
	}
	grown, err := m.guestMemory(ctx)
	if err != nil {
		return err
	}
	if grown-before < (largeLimit-smallLimit)>>21 {
		return fmt.Errorf("the guest has %.0f MiB after it grew from %.0f", grown, before)
	}
	used, freed, err := m.useAndFree(ctx)
	if err != nil {
		return err
	}
	shrink, err := m.limit(ctx, smallLimit)
	if err != nil {
		return err
	}
	after, err := m.guestMemory(ctx)
	if err != nil {
		return err
	}
	back, err := statusMiB(m.vmm, "VmRSS")
	if err != nil {
		return err
	}
	for name, v := range map[string]float64{memoryGrow: milliseconds(grow), memoryShrink: milliseconds(shrink)} {
		add(Row{name, Kata, Milliseconds}, v)
	}
	add(Row{memoryKept, Kata, Percent}, max(0, 100*(after-before)/(grown-before)))
	add(Row{memoryFreed, Kata, Percent}, freed)
	for name, v := range map[string]float64{rssSmall: small, rssUsed: used, rssBack: back} {
		add(Row{name, Kata, Mebibytes}, v)
	}
	return nil
}

// useAndFree lets a program take freedBytes and end. It returns how much memory
// QEMU had at most, in MiB, and the part of freedBytes that it still has after
// freedTime, in per cent.
func (m *resized) useAndFree(ctx context.Context) (peak, kept float64, err error) {
	before, err := statusMiB(m.vmm, "VmRSS")
	if err != nil {
		return 0, 0, err
	}
	// proc(5), clear_refs: 5 makes the peak begin anew.
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", m.vmm), []byte("5"), 0); err != nil {
		return 0, 0, err
	}
	if _, err := m.shell(ctx, fmt.Sprintf("dd if=/dev/zero of=/dev/null bs=%d count=1 2>/dev/null", freedBytes)); err != nil {
		return 0, 0, err
	}
	if peak, err = statusMiB(m.vmm, "VmHWM"); err != nil {
		return 0, 0, err
	}
	if peak-before < freedBytes>>21 {
		return 0, 0, fmt.Errorf("%d MiB in the guest were %.0f MiB on the host", freedBytes>>20, peak-before)
	}
	if err := pause(ctx, freedTime); err != nil {
		return 0, 0, err
	}
	after, err := statusMiB(m.vmm, "VmRSS")
	return peak, max(0, 100*(after-before)/(freedBytes>>20)), err
}

// limit changes the container's memory limit.
func (m *resized) limit(ctx context.Context, bytes int64) (time.Duration, error) {
	began := time.Now()
	err := m.e.cri.UpdateContainerResources(ctx, m.first, &runtimeapi.ContainerResources{Linux: memoryLimit(bytes)})
	return time.Since(began), err
}

// guestMemory is what the guest's kernel has, in MiB.
func (m *resized) guestMemory(ctx context.Context) (float64, error) {
	out, err := m.shell(ctx, "grep MemTotal /proc/meminfo")
	if err != nil {
		return 0, err
	}
	return kibField(out, "MemTotal")
}

func (m *resized) shell(ctx context.Context, script string) (string, error) {
	out, stderr, err := m.e.cri.ExecSync(ctx, m.first, []string{"sh", "-c", script}, callTimeout)
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", script, err, stderr)
	}
	return string(out), nil
}

// statusMiB is a field of /proc/<pid>/status, in MiB.
func statusMiB(pid int, field string) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	return kibField(string(b), field)
}

// kibField reads the line "<field>: <n> kB", in MiB.
func kibField(text, field string) (float64, error) {
	kib, err := procstat.Field(text, field)
	return float64(kib) / 1024, err
}
