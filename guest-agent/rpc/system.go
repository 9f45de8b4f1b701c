// SPDX-License-Identifier: Apache-2.0

package rpc

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/guest-agent/boot"
	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/guest-agent/identity"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// MemHotplugByProbe tells the kernel where plugged memory begins.
func (s *Service) MemHotplugByProbe(_ context.Context, req *agentpb.MemHotplugByProbeRequest) (*emptypb.Empty, error) {
	for _, addr := range req.MemHotplugProbeAddr {
		if err := os.WriteFile("/sys/devices/system/memory/probe", fmt.Appendf(nil, "0x%x", addr), 0); err != nil {
			return nil, fault.New(fault.FailedPrecondition, "memory probe at 0x%x: %w", addr, err)
		}
	}
	return empty, nil
}

// ReseedRandomDev adds the host's random bytes to the guest's pool and makes the
// generator use them at once (random(4)): a restored machine needs that before
// any workload runs.
func (s *Service) ReseedRandomDev(_ context.Context, req *agentpb.ReseedRandomDevRequest) (*emptypb.Empty, error) {
	if len(req.Data) == 0 || len(req.Data) > 4096 {
		return nil, fault.New(fault.InvalidArgument, "data has %d bytes: want 1 to 4096", len(req.Data))
	}
	if err := identity.Reseed(req.Data); err != nil {
		return nil, err
	}
	return empty, nil
}

// AddSwap uses the disk at a PCI path as swap.
func (s *Service) AddSwap(ctx context.Context, req *agentpb.AddSwapRequest) (*emptypb.Empty, error) {
	if err := s.Modules.Ensure(boot.GroupBlock); err != nil {
		return nil, err
	}
	var segs []string
	for _, slot := range req.PCIPath {
		segs = append(segs, fmt.Sprintf("%02x", slot))
	}
	node, err := s.Finder.BlockByPCI(ctx, strings.Join(segs, "/"))
	if err != nil {
		return nil, err
	}
	return empty, swapOn(node)
}

// AddSwapPath uses a device by its name as swap.
func (s *Service) AddSwapPath(ctx context.Context, req *agentpb.AddSwapPathRequest) (*emptypb.Empty, error) {
	node, err := s.Finder.BlockByName(ctx, req.Path)
	if err != nil {
		return nil, err
	}
	return empty, swapOn(node)
}

func swapOn(node string) error {
	path, err := unix.BytePtrFromString(node)
	if err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(unix.SYS_SWAPON, uintptr(unsafe.Pointer(path)), 0, 0); errno != 0 {
		return fmt.Errorf("swap on %s (the host formats it with mkswap): %w", node, errno)
	}
	return nil
}

// ResizeVolume grows a mounted ext4 volume after its disk has grown.
func (s *Service) ResizeVolume(ctx context.Context, req *agentpb.ResizeVolumeRequest) (*emptypb.Empty, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(req.VolumeGuestPath, &st); err != nil {
		return nil, fault.New(fault.NotFound, "volume_guest_path %s: %w", req.VolumeGuestPath, err)
	}
	if st.Type != unix.EXT4_SUPER_MAGIC {
		return nil, fault.New(fault.FailedPrecondition, "volume %s is not ext4: only ext4 is resized in place", req.VolumeGuestPath)
	}
	f, err := os.Open(req.VolumeGuestPath)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if req.Size == 0 {
		return nil, fault.New(fault.InvalidArgument, "size is 0: want the new size in bytes")
	}
	var on unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &on); err != nil {
		return nil, err
	}
	if err := s.Finder.BlockGrown(ctx, on.Dev, req.Size); err != nil {
		return nil, err
	}
	blocks := req.Size / uint64(st.Bsize)
	const ext4ResizeFS = 0x40086610 // _IOW('f', 16, __u64), EXT4_IOC_RESIZE_FS
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), ext4ResizeFS, uintptr(unsafe.Pointer(&blocks))); errno != 0 {
		return nil, fmt.Errorf("resize %s to %d bytes: %w", req.VolumeGuestPath, req.Size, errno)
	}
	return empty, nil
}

// GetMetrics describes the guest in Prometheus text format.
func (s *Service) GetMetrics(context.Context, *agentpb.GetMetricsRequest) (*agentpb.Metrics, error) {
	var b strings.Builder
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return nil, err
	}
	gauge := func(name, help string, v float64) {
		fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s gauge\n%s %g\n", name, help, name, name, v)
	}
	unit := float64(si.Unit)
	gauge("kata_guest_uptime_seconds", "Seconds since the guest kernel started.", float64(si.Uptime))
	gauge("kata_guest_load1", "Load average over one minute.", float64(si.Loads[0])/65536)
	gauge("kata_guest_memory_total_bytes", "Memory of the guest.", float64(si.Totalram)*unit)
	gauge("kata_guest_memory_free_bytes", "Free memory of the guest.", float64(si.Freeram)*unit)
	gauge("kata_guest_processes", "Processes in the guest.", float64(si.Procs))
	var ms runtime.MemStats
	runtime.ReadMemStats(&ms)
	gauge("kata_agent_heap_bytes", "Heap in use by the agent.", float64(ms.HeapInuse))
	gauge("kata_agent_sys_bytes", "Memory the agent has from the guest kernel.", float64(ms.Sys))
	gauge("kata_agent_goroutines", "Goroutines of the agent.", float64(runtime.NumGoroutine()))
	gauge("kata_agent_containers", "Containers in the guest.", float64(len(s.Pod.Containers())))
	return &agentpb.Metrics{Metrics: b.String()}, nil
}

// MemAgentMemcgSet belongs to a memory agent that this guest does not have.
func (s *Service) MemAgentMemcgSet(context.Context, *agentpb.MemAgentMemcgConfig) (*emptypb.Empty, error) {
	return nil, fault.New(fault.Unimplemented, "MemAgentMemcgSet: this guest has no memory agent")
}

// MemAgentCompactSet belongs to a memory agent that this guest does not have.
func (s *Service) MemAgentCompactSet(context.Context, *agentpb.MemAgentCompactConfig) (*emptypb.Empty, error) {
	return nil, fault.New(fault.Unimplemented, "MemAgentCompactSet: this guest has no memory agent")
}

// SetPolicy would restrict the host's requests; this agent does not judge them.
func (s *Service) SetPolicy(context.Context, *agentpb.SetPolicyRequest) (*emptypb.Empty, error) {
	return nil, fault.New(fault.Unimplemented, "SetPolicy: this agent has no policy engine and accepts every request")
}
