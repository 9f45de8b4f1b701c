// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-v2/kata/protocols/cripb"
	"github.com/kata-v2/kata/protocols/sandboxpb"
	"github.com/kata-v2/kata/sandbox"
)

// typePodSandboxConfig is the CRI's message as containerd names it (k8s.io/cri-api,
// proto package runtime.v1).
const typePodSandboxConfig = "runtime.v1.PodSandboxConfig"

// defaultShmBytes is the size of a pod's /dev/shm (containerd internal/cri/server/podsandbox, defaultShmSize).
const defaultShmBytes = 64 << 20

// defaultSysctls are set in every pod that does not set them itself, as
// containerd's CRI does where it writes a pause container's specification: any
// user of a pod may bind low ports and ping (enable_unprivileged_ports and
// enable_unprivileged_icmp, on by default since containerd 2.0).
var defaultSysctls = map[string]string{
	"net.ipv4.ip_unprivileged_port_start": "0",
	"net.ipv4.ping_group_range":           "0 2147483647",
}

// podSandboxConfig reads the options of a CreateSandbox; a caller that is not the
// CRI may give none.
func podSandboxConfig(a *anypb.Any) (*cripb.PodSandboxConfig, error) {
	c := &cripb.PodSandboxConfig{}
	if a == nil || (a.TypeUrl == "" && len(a.Value) == 0) {
		return c, nil
	}
	if t := optionsType(a); t != typePodSandboxConfig {
		return nil, fmt.Errorf("options of type %q: must be %s: %w", a.TypeUrl, typePodSandboxConfig, errdefs.ErrInvalidArgument)
	}
	if err := proto.Unmarshal(a.Value, c); err != nil {
		return nil, fmt.Errorf("options (%s): %w: %w", typePodSandboxConfig, err, errdefs.ErrInvalidArgument)
	}
	return c, nil
}

// podConfig is the pod that a CreateSandbox describes. files is a directory for
// what the containers see of it; it is written by writePodFiles.
func podConfig(r *sandboxpb.CreateSandboxRequest, c *cripb.PodSandboxConfig, files string) (sandbox.PodConfig, error) {
	linux := c.GetLinux()
	ns := linux.GetSecurityContext().GetNamespaceOptions()
	for _, u := range []struct {
		set                 bool
		field, why, instead string
	}{
		{ns.GetNetwork() == cripb.NamespaceMode_NODE, "network", "the host's network cannot be used by a virtual machine", "do not ask for hostNetwork"},
		{ns.GetPid() == cripb.NamespaceMode_NODE, "pid", "the host's processes are not in the virtual machine", "do not ask for hostPID"},
		{ns.GetIpc() == cripb.NamespaceMode_NODE, "ipc", "the host's IPC objects are not in the virtual machine", "do not ask for hostIPC"},
		{ns.GetUsernsOptions() != nil && ns.GetUsernsOptions().GetMode() != cripb.NamespaceMode_NODE, "userns_options", "user namespaces are not implemented yet", "leave hostUsers unset"},
	} {
		if u.set {
			return sandbox.PodConfig{}, fmt.Errorf("linux.security_context.namespace_options.%s: %s; %s: %w", u.field, u.why, u.instead, errdefs.ErrInvalidArgument)
		}
	}
	p := sandbox.PodConfig{
		NetNSPath:    r.NetnsPath,
		Networked:    r.GetOptions().GetTypeUrl() != "", // by the CRI, which makes the network first
		Hostname:     c.GetHostname(),
		SharePID:     ns.GetPid() == cripb.NamespaceMode_POD, // also of who says nothing: it is the CRI's default
		ShmBytes:     defaultShmBytes,
		Sysctls:      maps.Clone(defaultSysctls),
		Resources:    ociResources(linux.GetResources()),
		Overhead:     ociResources(linux.GetOverhead()),
		CgroupParent: linux.GetCgroupParent(),
		Annotations:  maps.Clone(c.GetAnnotations()),
		Files:        map[string]string{},
	}
	if p.Annotations == nil {
		p.Annotations = map[string]string{}
	}
	maps.Copy(p.Annotations, r.Annotations)
	maps.Copy(p.Sysctls, linux.GetSysctls())
	if c.GetDnsConfig() != nil {
		p.DNS = strings.Split(strings.TrimSuffix(resolvConf(c.GetDnsConfig()), "\n"), "\n")
	}
	for _, name := range []string{"hostname", "hosts", "resolv.conf"} {
		p.Files["/etc/"+name] = filepath.Join(files, name)
	}
	return p, nil
}

// ociResources are limits in the form of the OCI; nil for none.
func ociResources(r *cripb.LinuxContainerResources) *specs.LinuxResources {
	if r == nil {
		return nil
	}
	out := &specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: r.CpusetCpus, Mems: r.CpusetMems}, Memory: &specs.LinuxMemory{}, Unified: r.Unified}
	if r.CpuPeriod > 0 {
		period := uint64(r.CpuPeriod)
		out.CPU.Period = &period
	}
	if r.CpuQuota != 0 {
		out.CPU.Quota = &r.CpuQuota
	}
	if r.CpuShares > 0 {
		shares := uint64(r.CpuShares)
		out.CPU.Shares = &shares
	}
	if r.MemoryLimitInBytes > 0 {
		out.Memory.Limit = &r.MemoryLimitInBytes
	}
	if r.MemorySwapLimitInBytes > 0 {
		out.Memory.Swap = &r.MemorySwapLimitInBytes
	}
	for _, h := range r.HugepageLimits {
		out.HugepageLimits = append(out.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: h.PageSize, Limit: h.Limit})
	}
	return out
}

// resolvConf is the text of a resolv.conf (resolv.conf(5)).
func resolvConf(d *cripb.DNSConfig) string {
	var b strings.Builder
	if len(d.GetSearches()) > 0 {
		b.WriteString("search " + strings.Join(d.GetSearches(), " ") + "\n")
	}
	for _, s := range d.GetServers() {
		b.WriteString("nameserver " + s + "\n")
	}
	if len(d.GetOptions()) > 0 {
		b.WriteString("options " + strings.Join(d.GetOptions(), " ") + "\n")
	}
	return b.String()
}

// writePodFiles writes the files that an engine with a pause container keeps for
// the pod: name, hosts, resolv.conf. Where the pod says nothing they are the host's.
func writePodFiles(dir string, c *cripb.PodSandboxConfig) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("files of the pod: %w", err)
	}
	name := c.GetHostname()
	if name == "" {
		var err error
		if name, err = os.Hostname(); err != nil {
			return fmt.Errorf("hostname of the pod: %w", err)
		}
	}
	hosts, err := os.ReadFile("/etc/hosts")
	resolv := []byte(resolvConf(c.GetDnsConfig()))
	if errors.Is(err, os.ErrNotExist) {
		hosts, err = []byte("127.0.0.1 localhost\n::1 localhost\n"), nil
	}
	if err == nil && c.GetDnsConfig() == nil {
		if resolv, err = os.ReadFile("/etc/resolv.conf"); errors.Is(err, os.ErrNotExist) {
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("files of the pod: %w", err)
	}
	for file, data := range map[string][]byte{"hostname": []byte(name + "\n"), "hosts": hosts, "resolv.conf": resolv} {
		if err := os.WriteFile(filepath.Join(dir, file), data, 0o644); err != nil {
			return fmt.Errorf("files of the pod: %w", err)
		}
	}
	return nil
}
