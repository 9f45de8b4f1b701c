// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"crypto/sha256"
	"encoding/binary"
	"strconv"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/protocols"
)

// The VMM of each pod runs as a user of its own. The ids are a hash of the
// pod's key in a range that no user database hands out (systemd's UIDS-GIDS.md
// lists 0x70000000 to 0x7ffffffe as free of any assignment); two pods that
// collide merely share one.
const (
	vmmUIDBase = 0x70000000
	vmmUIDMask = 0x00ffffff
)

// VMMUser is the uid and gid of the VMM of the pod with this key.
func VMMUser(key string) uint32 {
	sum := sha256.Sum256([]byte(key))
	return vmmUIDBase + binary.BigEndian.Uint32(sum[:])&vmmUIDMask
}

// planVM turns the configuration and the pod's size into its machine. It is a pure
// function; shares, paths and callbacks of the run are added by the caller.
func planVM(c *config.Config, id, key, netns string, z *sizer) hypervisor.Config {
	boot, most := z.base, z.bounds.most
	if z.bounds.fixed {
		most = boot
	}
	vc := hypervisor.Config{
		ID:           id,
		Kernel:       c.QEMU.Kernel,
		Initrd:       c.QEMU.Initrd,
		KernelParams: kernelParams(c, most.cpus),
		ReadyParam:   protocols.ParamReadyPort,
		CPUs:         boot.cpus,
		MaxCPUs:      most.cpus,
		MemoryBytes:  boot.memory,
		ReclaimFreed: c.QEMU.ReclaimGuestFreedMemory && !c.QEMU.EnableHugePages && !c.QEMU.EnableMemPrealloc,
		HugePages:    c.QEMU.EnableHugePages,
		Prealloc:     c.QEMU.EnableMemPrealloc,
		Vsock:        hypervisor.VsockBackend(c.QEMU.Vsock),
		Network:      hypervisor.NetNS{Path: netns, Host: c.Runtime.DisableNewNetNS},
	}
	if !z.bounds.fixedMemory {
		vc.MaxMemoryBytes = most.memory
	}
	if c.QEMU.Rootless {
		vc.UID = VMMUser(key)
		vc.GID = vc.UID
	}
	return vc
}

// kernelParams are the agent's parameters and the operator's, which come last and so win.
func kernelParams(c *config.Config, maxCPUs int) []string {
	p := []string{
		"nr_cpus=" + strconv.Itoa(maxCPUs),
		protocols.ParamStdioPort + "=" + strconv.Itoa(protocols.StdioPort),
	}
	if c.Agent.EnableDebug {
		p = append(p, protocols.ParamLogLevel+"=debug")
	}
	if c.QEMU.EnableDebug {
		p = append(p, "loglevel=7", "ignore_loglevel")
	} else {
		p = append(p, protocols.ParamLogPort+"="+strconv.Itoa(protocols.LogPort))
	}
	if c.Agent.DebugConsoleEnabled {
		p = append(p, protocols.ParamDebugConsole, protocols.ParamDebugConsolePort+"="+strconv.Itoa(protocols.DebugConsolePort))
	}
	if n := c.Agent.ContainerPipeSize; n > 0 {
		p = append(p, protocols.ParamPipeSize+"="+strconv.Itoa(n))
	}
	p = append(p, protocols.ParamLaunchTimeout+"="+strconv.Itoa(int(c.Agent.LaunchProcessTimeout.Seconds())))
	if s := c.QEMU.KernelParams; s != "" {
		p = append(p, s)
	}
	return p
}
