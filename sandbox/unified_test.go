// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func at[T any](v T) *T { return &v }

func TestPlainLimits(t *testing.T) {
	for name, c := range map[string]struct{ in, want specs.LinuxResources }{
		"nothing": {},
		"plain": {
			specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: at(uint64(2)), Quota: at(int64(3))}, Memory: &specs.LinuxMemory{Limit: at(int64(4))}},
			specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: at(uint64(2)), Quota: at(int64(3))}, Memory: &specs.LinuxMemory{Limit: at(int64(4))}},
		},
		"files win": {
			specs.LinuxResources{
				CPU: &specs.LinuxCPU{Quota: at(int64(3)), Shares: at(uint64(9))}, Memory: &specs.LinuxMemory{Limit: at(int64(4)), Reservation: at(int64(2))},
				Unified: map[string]string{"cpu.max": "50000 200000", "memory.max": "max", "cpuset.cpus": "0-1", "cpuset.mems": "0", "memory.high": "5", "io.weight": "100"},
			},
			specs.LinuxResources{
				CPU:    &specs.LinuxCPU{Quota: at(int64(50000)), Period: at(uint64(200000)), Shares: at(uint64(9)), Cpus: "0-1", Mems: "0"},
				Memory: &specs.LinuxMemory{Limit: at(int64(-1)), Reservation: at(int64(2))}, Unified: map[string]string{"memory.high": "5", "io.weight": "100"},
			},
		},
		"no field on the wire": {
			specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: at(int64(8)), Burst: at(uint64(7)), Idle: at(int64(1))}},
			specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: at(int64(8))}, Unified: map[string]string{"cpu.max.burst": "7", "cpu.idle": "1"}},
		},
		"the file of what has no field": {
			specs.LinuxResources{CPU: &specs.LinuxCPU{Burst: at(uint64(7))}, Unified: map[string]string{"cpu.max.burst": "3"}},
			specs.LinuxResources{Unified: map[string]string{"cpu.max.burst": "3"}},
		},
	} {
		got, err := plainLimits(&c.in)
		if err != nil || len(got.Unified) != len(c.want.Unified) || len(got.Unified) > 0 && !reflect.DeepEqual(got.Unified, c.want.Unified) ||
			!reflect.DeepEqual(got.CPU, c.want.CPU) || !reflect.DeepEqual(got.Memory, c.want.Memory) {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, c.want)
		}
	}
	for _, file := range []string{"io.max", "rdma.max", "misc.max", "cgroup.procs", "cpu./../cgroup.procs", "memory.", "notify_on_release", ""} {
		_, err := plainLimits(&specs.LinuxResources{Unified: map[string]string{file: "1"}})
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "linux.resources.unified") {
			t.Errorf("%q: %v", file, err)
		}
	}
	for file, value := range map[string]string{"cpu.max": "much", "memory.max": "1G", "io.weight": "8:0 100"} {
		_, err := plainLimits(&specs.LinuxResources{Unified: map[string]string{file: value}})
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), file) {
			t.Errorf("%s = %q: %v", file, value, err)
		}
	}
}

// An update names what it changes; the guest needs the other half of what is one file there.
func TestCompleteUpdate(t *testing.T) {
	was := &specs.LinuxResources{
		CPU:    &specs.LinuxCPU{Quota: at(int64(50_000)), Period: at(uint64(100_000))},
		Memory: &specs.LinuxMemory{Limit: at(int64(100)), Swap: at(int64(150))},
	}
	got := complete(was, &specs.LinuxResources{CPU: &specs.LinuxCPU{Period: at(uint64(20_000))}, Memory: &specs.LinuxMemory{Swap: at(int64(300))}})
	if *got.CPU.Quota != 50_000 || *got.CPU.Period != 20_000 || *got.Memory.Limit != 100 || *got.Memory.Swap != 300 {
		t.Errorf("%+v, %+v", got.CPU, got.Memory)
	}
	got = complete(was, &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: at(uint64(5))}, Memory: &specs.LinuxMemory{Limit: at(int64(200))}})
	if got.CPU.Quota != nil || got.Memory.Swap != nil {
		t.Errorf("what was not changed: %+v, %+v", got.CPU, got.Memory)
	}
	if complete(was, nil) != nil {
		t.Error("nothing became something")
	}
}
