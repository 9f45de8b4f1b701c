// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/sandbox/agentclient"
)

// unifiedPrefixes are the controllers whose files a container may name. Those of
// the others are about devices of the host, or do not limit.
var unifiedPrefixes = []string{"cpu.", "cpuset.", "memory.", "pids.", "hugetlb."}

// plainLimits are limits without a map of files of cgroup v2 that say what fields
// say too: the size of the machine and its CPUs depend on those. Files come last,
// so they win (runtime-spec config-linux.md, "Unified"). What has no field in the
// protocol becomes a file. r is not changed.
func plainLimits(r *specs.LinuxResources) (*specs.LinuxResources, error) {
	if r == nil {
		return nil, nil
	}
	out := *r
	out.Unified = maps.Clone(r.Unified)
	cpu, memory := specs.LinuxCPU{}, specs.LinuxMemory{}
	if r.CPU != nil {
		cpu = *r.CPU
	}
	if r.Memory != nil {
		memory = *r.Memory
	}
	for file, value := range r.Unified {
		if !unifiedAllowed(file, value) {
			return nil, refuse(fmt.Sprintf("linux.resources.unified[%q]", file), "this file cannot be set in a virtual machine",
				"name a file of one of the controllers "+strings.Join(unifiedPrefixes, "* ")+"*, or io.weight")
		}
		moved, err := plainFile(file, strings.TrimSpace(value), &cpu, &memory)
		if err != nil {
			return nil, fmt.Errorf("linux.resources.unified[%q] is %q: %w: %w", file, value, err, errdefs.ErrInvalidArgument)
		}
		if moved {
			delete(out.Unified, file)
		}
	}
	file := func(name, value string) {
		if _, ok := out.Unified[name]; ok {
			return
		}
		if out.Unified == nil {
			out.Unified = map[string]string{}
		}
		out.Unified[name] = value
	}
	if cpu.Burst != nil {
		file("cpu.max.burst", strconv.FormatUint(*cpu.Burst, 10))
	}
	if cpu.Idle != nil {
		file("cpu.idle", strconv.FormatInt(*cpu.Idle, 10))
	}
	cpu.Burst, cpu.Idle = nil, nil
	if cpu != (specs.LinuxCPU{}) {
		out.CPU = &cpu
	} else {
		out.CPU = nil
	}
	if memory != (specs.LinuxMemory{}) {
		out.Memory = &memory
	}
	return &out, nil
}

// unifiedAllowed: of io.weight the form without a device is known everywhere.
func unifiedAllowed(file, value string) bool {
	if strings.ContainsRune(file, '/') {
		return false
	}
	if file == "io.weight" {
		return !strings.ContainsRune(value, ':')
	}
	for _, p := range unifiedPrefixes {
		if strings.HasPrefix(file, p) && len(file) > len(p) {
			return true
		}
	}
	return false
}

// plainFile moves a file's value to the field that says the same, if there is one.
func plainFile(file, value string, cpu *specs.LinuxCPU, memory *specs.LinuxMemory) (moved bool, err error) {
	switch file {
	case "cpu.max":
		quota, period, both := strings.Cut(value, " ")
		if cpu.Quota, err = number(quota); err != nil || !both {
			return true, err
		}
		p, err := strconv.ParseUint(period, 10, 64)
		cpu.Period = &p
		return true, err
	case "memory.max":
		memory.Limit, err = number(value)
		return true, err
	case "cpuset.cpus":
		cpu.Cpus = value
		return true, nil
	case "cpuset.mems":
		cpu.Mems = value
		return true, nil
	}
	return false, nil
}

// number is a limit of version 2, -1 for "max".
func number(s string) (*int64, error) {
	if s == "max" {
		none := int64(-1)
		return &none, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return &n, err
}

// plainSpec is a specification with plainLimits.
func plainSpec(spec *specs.Spec) (*specs.Spec, error) {
	if spec.Linux.Resources == nil {
		return spec, nil
	}
	r, err := plainLimits(spec.Linux.Resources)
	if err != nil {
		return nil, err
	}
	out, linux := *spec, *spec.Linux
	out.Linux, linux.Resources = &linux, r
	return &out, nil
}

// holdsLimits refuses limits that an agent other than ours would ignore.
func holdsLimits(agent *agentclient.Client, r *specs.LinuxResources) error {
	if r == nil || len(r.Unified) == 0 || agent.Unified() {
		return nil
	}
	files := slices.Sorted(maps.Keys(r.Unified))
	return fmt.Errorf("linux.resources: the agent in this guest image cannot set %s; leave out cpu.burst, cpu.idle and unified: %w", strings.Join(files, ", "), errdefs.ErrFailedPrecondition)
}
