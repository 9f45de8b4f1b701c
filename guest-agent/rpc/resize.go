// SPDX-License-Identifier: Apache-2.0

package rpc

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/guest-agent/boot"
	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// OnlineCPUMem brings CPUs and memory up that were plugged in. nb_cpus bounds how
// many CPUs (0: all that are there); online_cpus instead says how many are to be
// up in all, and takes those above down. With wait it returns when so many CPUs
// have been found, bounded by agent.hotplug_timeout.
func (s *Service) OnlineCPUMem(ctx context.Context, req *agentpb.OnlineCPUMemRequest) (*emptypb.Empty, error) {
	changed, err := s.onlineCPUs(ctx, req)
	if changed {
		runtime.SetDefaultGOMAXPROCS() // cmd/kata-agent turned the periodic look off
		s.netMu.Lock()
		s.spreadQueues()
		s.netMu.Unlock()
	}
	if err != nil {
		return nil, fmt.Errorf("bring CPUs up: %w", err)
	}
	if req.CpuOnly {
		return empty, nil
	}
	if err := s.Modules.EnsureVirtio(s.Finder.Sys, boot.VirtioMem, "virtio_mem"); err != nil {
		return nil, fmt.Errorf("bring memory up: %w", err)
	}
	blocks, err := filepath.Glob(filepath.Join(s.Finder.Sys, "devices/system/memory/memory[0-9]*/state"))
	for _, b := range blocks {
		if err == nil {
			err = bringUp(b, os.WriteFile)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("bring memory up: %w", err)
	}
	return empty, nil
}

// bringUp brings a block of memory up by its state file, which write writes. Two
// calls may do so at once, and the driver by itself: whoever comes second gets an EINVAL
// (kernel drivers/base/memory.c, state_store), and a block may be unplugged meanwhile.
func bringUp(state string, write func(string, []byte, os.FileMode) error) error {
	if !reads(state, "offline") {
		return nil
	}
	if err := write(state, []byte("online"), 0); err != nil && reads(state, "offline") {
		return err
	}
	return nil
}

// onlineCPUs says whether any CPU went up or down.
func (s *Service) onlineCPUs(ctx context.Context, req *agentpb.OnlineCPUMemRequest) (changed bool, err error) {
	n, total := 0, int(req.OnlineCpus)
	look := func() (bool, error) {
		cpus, err := cpusIn(s.Finder.Sys)
		if err != nil {
			return false, err
		}
		for i, c := range cpus {
			up := req.OnlineCpus == 0 && (req.NbCpus == 0 || n < int(req.NbCpus)) || i < total
			if !up || c.up() {
				continue
			}
			if n == 0 && s.OneCPU != nil {
				if err := s.OneCPU(); err != nil {
					return false, err
				}
			}
			if err := c.set("1"); err != nil {
				return false, err
			}
			n++
		}
		return len(cpus) >= total && (total > 0 || n >= int(req.NbCpus)), nil
	}
	done, err := look()
	if err == nil && !done && req.Wait {
		err = s.Finder.WaitFor(ctx, fmt.Sprintf("%d CPUs", max(total, int(req.NbCpus))), look)
	}
	if err != nil || total == 0 {
		return n > 0, err
	}
	down, err := takeDown(s.Finder.Sys, total)
	return n+down > 0, err
}

// takeDown leaves the first n CPUs up.
func takeDown(sys string, n int) (down int, err error) {
	cpus, err := cpusIn(sys)
	if err != nil {
		return 0, err
	}
	for i, c := range slices.Backward(cpus) {
		if i < max(n, 1) || !c.up() {
			continue
		}
		if err := c.set("0"); err != nil {
			return down, fault.New(fault.FailedPrecondition, "CPU %d stays up: %w", c.number, err)
		}
		down++
	}
	return down, nil
}

// cpu is one CPU that the machine has, up or down.
type cpu struct {
	number int
	dir    string
}

// cpusIn lists the CPUs in the order of their numbers.
func cpusIn(sys string) ([]cpu, error) {
	dirs, err := filepath.Glob(filepath.Join(sys, "devices/system/cpu/cpu[0-9]*"))
	if err != nil {
		return nil, err
	}
	var out []cpu
	for _, d := range dirs {
		if n, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(d), "cpu")); err == nil {
			out = append(out, cpu{n, d})
		}
	}
	slices.SortFunc(out, func(a, b cpu) int { return cmp.Compare(a.number, b.number) })
	return out, nil
}

// up: one without the file cannot be taken down.
func (c cpu) up() bool { return !reads(c.file(), "0") }

func (c cpu) file() string { return filepath.Join(c.dir, "online") }

func (c cpu) set(v string) error { return os.WriteFile(c.file(), []byte(v), 0) }

func reads(file, text string) bool {
	b, err := os.ReadFile(file)
	return err == nil && strings.TrimSpace(string(b)) == text
}
