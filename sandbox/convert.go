// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/protocols/agentpb"
)

// wireSpec is the specification in the protocol's form (protocols/oci.proto).
func wireSpec(s *specs.Spec) *agentpb.Spec {
	out := &agentpb.Spec{
		Version:     s.Version,
		Process:     wireProcess(s.Process),
		Hostname:    s.Hostname,
		Annotations: s.Annotations,
		Linux:       wireLinux(s.Linux),
	}
	if s.Root != nil {
		out.Root = &agentpb.Root{Path: s.Root.Path, Readonly: s.Root.Readonly}
	}
	for _, m := range s.Mounts {
		out.Mounts = append(out.Mounts, &agentpb.Mount{Destination: m.Destination, Source: m.Source, Type: m.Type, Options: m.Options})
	}
	return out
}

func wireProcess(p *specs.Process) *agentpb.Process {
	if p == nil {
		return nil
	}
	out := &agentpb.Process{
		Terminal:        p.Terminal,
		User:            &agentpb.User{UID: p.User.UID, GID: p.User.GID, AdditionalGids: p.User.AdditionalGids, Username: p.User.Username},
		Args:            p.Args,
		Env:             p.Env,
		Cwd:             p.Cwd,
		NoNewPrivileges: p.NoNewPrivileges,
		ApparmorProfile: p.ApparmorProfile,
		SelinuxLabel:    p.SelinuxLabel,
	}
	if p.ConsoleSize != nil {
		out.ConsoleSize = &agentpb.Box{Height: uint32(p.ConsoleSize.Height), Width: uint32(p.ConsoleSize.Width)}
	}
	if c := p.Capabilities; c != nil {
		out.Capabilities = &agentpb.LinuxCapabilities{
			Bounding: c.Bounding, Effective: c.Effective, Inheritable: c.Inheritable, Permitted: c.Permitted, Ambient: c.Ambient,
		}
	}
	for _, r := range p.Rlimits {
		out.Rlimits = append(out.Rlimits, &agentpb.POSIXRlimit{Type: r.Type, Hard: r.Hard, Soft: r.Soft})
	}
	if p.OOMScoreAdj != nil {
		out.OOMScoreAdj = int64(*p.OOMScoreAdj)
	}
	return out
}

func wireLinux(l *specs.Linux) *agentpb.Linux {
	if l == nil {
		return nil
	}
	out := &agentpb.Linux{
		UIDMappings:       wireIDMappings(l.UIDMappings),
		GIDMappings:       wireIDMappings(l.GIDMappings),
		Sysctl:            l.Sysctl,
		Resources:         wireResources(l.Resources),
		CgroupsPath:       l.CgroupsPath,
		Seccomp:           wireSeccomp(l.Seccomp),
		RootfsPropagation: l.RootfsPropagation,
		MaskedPaths:       l.MaskedPaths,
		ReadonlyPaths:     l.ReadonlyPaths,
		MountLabel:        l.MountLabel,
	}
	for _, n := range l.Namespaces {
		out.Namespaces = append(out.Namespaces, &agentpb.LinuxNamespace{Type: string(n.Type), Path: n.Path})
	}
	for _, d := range l.Devices {
		w := &agentpb.LinuxDevice{Path: d.Path, Type: d.Type, Major: d.Major, Minor: d.Minor, FileMode: 0o666}
		if d.FileMode != nil {
			w.FileMode = uint32(*d.FileMode)
		}
		w.UID, w.GID = value(d.UID), value(d.GID)
		out.Devices = append(out.Devices, w)
	}
	return out
}

func wireIDMappings(in []specs.LinuxIDMapping) []*agentpb.LinuxIDMapping {
	var out []*agentpb.LinuxIDMapping
	for _, m := range in {
		out = append(out, &agentpb.LinuxIDMapping{HostID: m.HostID, ContainerID: m.ContainerID, Size: m.Size})
	}
	return out
}

// wireResources leaves out what the guest cannot hold; see guestLinux.
func wireResources(r *specs.LinuxResources) *agentpb.LinuxResources {
	if r == nil {
		return nil
	}
	out := &agentpb.LinuxResources{Unified: r.Unified}
	for _, d := range r.Devices {
		w := &agentpb.LinuxDeviceCgroup{Allow: d.Allow, Type: d.Type, Access: d.Access, Major: -1, Minor: -1}
		if d.Major != nil {
			w.Major = *d.Major
		}
		if d.Minor != nil {
			w.Minor = *d.Minor
		}
		out.Devices = append(out.Devices, w)
	}
	if m := r.Memory; m != nil {
		out.Memory = &agentpb.LinuxMemory{
			Limit: value(m.Limit), Reservation: value(m.Reservation), Swap: value(m.Swap),
			Swappiness: value(m.Swappiness), DisableOOMKiller: value(m.DisableOOMKiller),
		}
	}
	if c := r.CPU; c != nil {
		out.CPU = &agentpb.LinuxCPU{
			Shares: value(c.Shares), Quota: value(c.Quota), Period: value(c.Period),
			RealtimeRuntime: value(c.RealtimeRuntime), RealtimePeriod: value(c.RealtimePeriod), Cpus: c.Cpus, Mems: c.Mems,
		}
	}
	if r.Pids != nil {
		out.Pids = &agentpb.LinuxPids{Limit: value(r.Pids.Limit)}
	}
	if b := r.BlockIO; b != nil {
		out.BlockIO = &agentpb.LinuxBlockIO{
			ThrottleReadBpsDevice: wireRates(b.ThrottleReadBpsDevice), ThrottleWriteBpsDevice: wireRates(b.ThrottleWriteBpsDevice),
			ThrottleReadIOPSDevice: wireRates(b.ThrottleReadIOPSDevice), ThrottleWriteIOPSDevice: wireRates(b.ThrottleWriteIOPSDevice),
		}
	}
	for _, h := range r.HugepageLimits {
		out.HugepageLimits = append(out.HugepageLimits, &agentpb.LinuxHugepageLimit{Pagesize: h.Pagesize, Limit: h.Limit})
	}
	return out
}

func wireRates(in []specs.LinuxThrottleDevice) (out []*agentpb.LinuxThrottleDevice) {
	for _, d := range in {
		out = append(out, &agentpb.LinuxThrottleDevice{Major: d.Major, Minor: d.Minor, Rate: d.Rate})
	}
	return out
}

func wireSeccomp(s *specs.LinuxSeccomp) *agentpb.LinuxSeccomp {
	if s == nil {
		return nil
	}
	out := &agentpb.LinuxSeccomp{DefaultAction: string(s.DefaultAction)}
	for _, a := range s.Architectures {
		out.Architectures = append(out.Architectures, string(a))
	}
	for _, f := range s.Flags {
		out.Flags = append(out.Flags, string(f))
	}
	for _, c := range s.Syscalls {
		w := &agentpb.LinuxSyscall{Names: c.Names, Action: string(c.Action), Errnoret: uint32(value(c.ErrnoRet))}
		for _, a := range c.Args {
			w.Args = append(w.Args, &agentpb.LinuxSeccompArg{Index: uint64(a.Index), Value: a.Value, ValueTwo: a.ValueTwo, Op: string(a.Op)})
		}
		out.Syscalls = append(out.Syscalls, w)
	}
	return out
}

// value is what p points to, or zero.
func value[T any](p *T) T {
	if p == nil {
		var zero T
		return zero
	}
	return *p
}
