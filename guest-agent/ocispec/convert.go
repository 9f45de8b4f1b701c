// SPDX-License-Identifier: Apache-2.0

// Package ocispec turns the OCI specification as it travels on the wire into the
// one an OCI engine in the guest reads, and adapts it to the guest. Everything
// here is a pure function. The wire (proto3) cannot tell zero from absent: zero
// is absent wherever the specification has an optional value.
package ocispec

import (
	"os"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// specVersion is what the engine is told, whatever the wire names: crun 1.8
// refuses versions that it does not know, and newer ones only add fields.
const specVersion = "1.0.2"

// Convert translates a whole specification. It fails with InvalidArgument when a
// part that every container needs is missing.
func Convert(in *agentpb.Spec) (*specs.Spec, error) {
	if in.GetProcess() == nil {
		return nil, fault.New(fault.InvalidArgument, "OCI.Process is missing")
	}
	if in.GetRoot().GetPath() == "" {
		return nil, fault.New(fault.InvalidArgument, "OCI.Root.Path is missing: want the guest path of the root file system")
	}
	if in.GetLinux() == nil {
		return nil, fault.New(fault.InvalidArgument, "OCI.Linux is missing")
	}
	p, err := Process(in.Process)
	if err != nil {
		return nil, err
	}
	out := &specs.Spec{
		Version:     specVersion,
		Process:     p,
		Root:        &specs.Root{Path: in.Root.Path, Readonly: in.Root.Readonly},
		Hostname:    in.Hostname,
		Hooks:       hooks(in.Hooks),
		Annotations: in.Annotations,
		Linux:       linux(in.Linux),
	}
	for _, m := range in.Mounts {
		out.Mounts = append(out.Mounts, specs.Mount{
			Destination: m.Destination, Source: m.Source, Type: m.Type, Options: m.Options,
		})
	}
	return out, nil
}

// Process translates one process, of a container or of an exec.
func Process(in *agentpb.Process) (*specs.Process, error) {
	if len(in.GetArgs()) == 0 || in.Args[0] == "" {
		return nil, fault.New(fault.InvalidArgument, "Process.Args is empty: want the executable and its arguments")
	}
	p := &specs.Process{
		Terminal: in.Terminal,
		User: specs.User{
			UID: in.GetUser().GetUID(), GID: in.GetUser().GetGID(), AdditionalGids: in.GetUser().GetAdditionalGids(),
		},
		Args:            in.Args,
		Env:             in.Env,
		Cwd:             or(in.Cwd, "/"),
		NoNewPrivileges: in.NoNewPrivileges,
		// AppArmor and SELinux labels name policies of the host; the guest kernel
		// has neither, and an engine refuses a label that it cannot set.
	}
	if c := in.ConsoleSize; c != nil && (c.Height != 0 || c.Width != 0) {
		p.ConsoleSize = &specs.Box{Height: uint(c.Height), Width: uint(c.Width)}
	}
	if c := in.Capabilities; c != nil {
		p.Capabilities = &specs.LinuxCapabilities{
			Bounding: c.Bounding, Effective: c.Effective, Inheritable: c.Inheritable,
			Permitted: c.Permitted, Ambient: c.Ambient,
		}
	}
	for _, r := range in.Rlimits {
		p.Rlimits = append(p.Rlimits, specs.POSIXRlimit{Type: r.Type, Hard: r.Hard, Soft: r.Soft})
	}
	if in.OOMScoreAdj != 0 {
		p.OOMScoreAdj = ptr(int(in.OOMScoreAdj))
	}
	return p, nil
}

func linux(in *agentpb.Linux) *specs.Linux {
	out := &specs.Linux{
		UIDMappings:       mappings(in.UIDMappings),
		GIDMappings:       mappings(in.GIDMappings),
		Sysctl:            in.Sysctl,
		CgroupsPath:       in.CgroupsPath,
		Resources:         Resources(in.Resources),
		Seccomp:           seccomp(in.Seccomp),
		RootfsPropagation: in.RootfsPropagation,
		MaskedPaths:       in.MaskedPaths,
		ReadonlyPaths:     in.ReadonlyPaths,
	}
	for _, n := range in.Namespaces {
		out.Namespaces = append(out.Namespaces, specs.LinuxNamespace{Type: specs.LinuxNamespaceType(n.Type), Path: n.Path})
	}
	for _, d := range in.Devices {
		dev := specs.LinuxDevice{Path: d.Path, Type: d.Type, Major: d.Major, Minor: d.Minor, UID: ptr(d.UID), GID: ptr(d.GID)}
		if d.FileMode != 0 {
			dev.FileMode = ptr(os.FileMode(d.FileMode))
		}
		out.Devices = append(out.Devices, dev)
	}
	return out
}

func mappings(in []*agentpb.LinuxIDMapping) []specs.LinuxIDMapping {
	var out []specs.LinuxIDMapping
	for _, m := range in {
		out = append(out, specs.LinuxIDMapping{ContainerID: m.ContainerID, HostID: m.HostID, Size: m.Size})
	}
	return out
}

func seccomp(in *agentpb.LinuxSeccomp) *specs.LinuxSeccomp {
	if in == nil {
		return nil
	}
	out := &specs.LinuxSeccomp{DefaultAction: specs.LinuxSeccompAction(in.DefaultAction)}
	for _, a := range in.Architectures {
		out.Architectures = append(out.Architectures, specs.Arch(a))
	}
	for _, f := range in.Flags {
		out.Flags = append(out.Flags, specs.LinuxSeccompFlag(f))
	}
	for _, s := range in.Syscalls {
		sc := specs.LinuxSyscall{Names: s.Names, Action: specs.LinuxSeccompAction(s.Action)}
		if s.Errnoret != 0 {
			sc.ErrnoRet = ptr(uint(s.Errnoret))
		}
		for _, a := range s.Args {
			sc.Args = append(sc.Args, specs.LinuxSeccompArg{
				Index: uint(a.Index), Value: a.Value, ValueTwo: a.ValueTwo, Op: specs.LinuxSeccompOperator(a.Op),
			})
		}
		out.Syscalls = append(out.Syscalls, sc)
	}
	return out
}

func hooks(in *agentpb.Hooks) *specs.Hooks {
	if in == nil {
		return nil
	}
	list := func(hs []*agentpb.Hook) []specs.Hook {
		var out []specs.Hook
		for _, h := range hs {
			hook := specs.Hook{Path: h.Path, Args: h.Args, Env: h.Env}
			if h.Timeout > 0 {
				hook.Timeout = ptr(int(h.Timeout))
			}
			out = append(out, hook)
		}
		return out
	}
	out := &specs.Hooks{
		Poststart: list(in.Poststart), Poststop: list(in.Poststop), CreateRuntime: list(in.CreateRuntime),
		CreateContainer: list(in.CreateContainer), StartContainer: list(in.StartContainer),
	}
	//lint:ignore SA1019 the wire still carries prestart hooks, and engines still run them
	out.Prestart = list(in.Prestart)
	return out
}

func ptr[T any](v T) *T { return &v }

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// nonZero is nil for zero: absent, as the wire cannot say it otherwise.
func nonZero[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	return &v
}
