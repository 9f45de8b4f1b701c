// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// refuse is an error for a specification that cannot work in a VM.
func refuse(field, why, instead string) error {
	return fmt.Errorf("%s: %s; %s: %w", field, why, instead, errdefs.ErrInvalidArgument)
}

// validateSpec refuses, before any host state is touched, what cannot work in a
// virtual machine. pod is the network namespace of the running pod's VMM, empty
// for the first container.
func validateSpec(spec *specs.Spec, pod string) error {
	if spec.Linux == nil {
		return refuse("linux", "the section is missing", "a Linux container is needed")
	}
	if spec.Process == nil || len(spec.Process.Args) == 0 {
		return refuse("process.args", "no command", "name the program to run")
	}
	if err := validateNetwork(spec, pod); err != nil {
		return err
	}
	if err := validatePause(spec); err != nil {
		return err
	}
	if err := validateUsers(spec); err != nil {
		return err
	}
	if err := validateSeccomp(spec.Linux.Seccomp); err != nil {
		return err
	}
	for i, m := range spec.Mounts {
		for _, o := range m.Options {
			if o == "shared" || o == "rshared" {
				return refuse(fmt.Sprintf("mounts[%d].options (%s)", i, m.Destination), o+" (Bidirectional propagation) would carry mounts of the guest to the host",
					"use rslave (HostToContainer) or rprivate")
			}
		}
	}
	return nil
}

// validatePause refuses a pod of the CRI that is to share the host's processes or IPC
// objects, which the first container of it says by leaving the namespace out.
func validatePause(spec *specs.Spec) error {
	if spec.Annotations[containerTypeKey] != "sandbox" {
		return nil
	}
	for _, ns := range []struct {
		kind         specs.LinuxNamespaceType
		why, instead string
	}{
		{specs.PIDNamespace, "the host's processes are not in the virtual machine", "do not ask for hostPID"},
		{specs.IPCNamespace, "the host's IPC objects are not in the virtual machine", "do not ask for hostIPC"},
	} {
		if !slices.ContainsFunc(spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == ns.kind }) {
			return refuse(fmt.Sprintf("linux.namespaces (no %s namespace)", ns.kind), ns.why, ns.instead)
		}
	}
	return nil
}

// validateUsers refuses user namespaces and mounts with mapped ids: the guest has
// neither, and ignoring them would run the container as a user that it did not ask for.
func validateUsers(spec *specs.Spec) error {
	for i, n := range spec.Linux.Namespaces {
		if n.Type == specs.UserNamespace {
			return refuse(fmt.Sprintf("linux.namespaces[%d] (user)", i), "user namespaces are not supported",
				"leave it out (hostUsers: true): the virtual machine separates the container's users from the host's")
		}
	}
	if len(spec.Linux.UIDMappings)+len(spec.Linux.GIDMappings) > 0 {
		return refuse("linux.uidMappings, linux.gidMappings", "user namespaces are not supported", "leave them empty")
	}
	for i, m := range spec.Mounts {
		mapped := len(m.UIDMappings)+len(m.GIDMappings) > 0
		if mapped || slices.Contains(m.Options, "idmap") || slices.Contains(m.Options, "ridmap") {
			return refuse(fmt.Sprintf("mounts[%d] (%s)", i, m.Destination), "mounts with mapped user ids are not supported", "leave the mappings out")
		}
	}
	return nil
}

// validateNetwork insists on a network namespace that belongs to this pod alone.
func validateNetwork(spec *specs.Spec, pod string) error {
	i := slices.IndexFunc(spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.NetworkNamespace })
	if i < 0 {
		return refuse("linux.namespaces", "no network namespace means the host's network, which a virtual machine cannot use",
			"add a network namespace (do not ask for host networking)")
	}
	path := spec.Linux.Namespaces[i].Path
	if path == "" {
		return nil
	}
	return validateNetNS(fmt.Sprintf("linux.namespaces[%d].path (network)", i), path, pod)
}

// validateNetNS checks the network namespace at path, which field named; pod is
// that of the running pod, if any.
func validateNetNS(field, path, pod string) error {
	ns, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("%s: %w: %w", field, err, errdefs.ErrInvalidArgument)
	}
	if same(ns, "/proc/1/ns/net") || same(ns, "/proc/self/ns/net") {
		return refuse(field, path+" is the host's network namespace, which a virtual machine cannot use", "give the pod a network namespace of its own")
	}
	if pod != "" && same(ns, pod) {
		return nil
	}
	if strings.HasPrefix(path, "/proc/") {
		return refuse(field, path+" is the network namespace of another container, whose devices cannot serve two machines",
			"put both containers into one pod (the same sandbox id)")
	}
	if pod != "" {
		return refuse(field, path+" is not the pod's network namespace", "all containers of a pod share one")
	}
	return nil
}

func same(a os.FileInfo, path string) bool {
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

// networkPath is the path of the specification's network namespace, empty for a new one.
func networkPath(spec *specs.Spec) string {
	for _, n := range spec.Linux.Namespaces {
		if n.Type == specs.NetworkNamespace {
			return n.Path
		}
	}
	return ""
}
