// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/qemu"
	"github.com/kata-v2/kata/images"
	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/internal/kvmprobe"
	"github.com/kata-v2/kata/internal/version"
	"github.com/kata-v2/kata/sandbox/template"
)

// NewQEMU returns QEMU as the configuration describes it. What the configuration
// names is looked for only when a machine starts. KVM is proven at once, in the
// background: that takes 5 ms, which nobody waits for when the machine is started later.
func NewQEMU(c *config.Config, log *slog.Logger) hypervisor.Hypervisor {
	h := newQEMU(c, log)
	go h.choose() //nolint:errcheck // bounded by itself; whoever starts a machine gets the answer
	return h
}

func newQEMU(c *config.Config, log *slog.Logger) *configuredQEMU {
	return &configuredQEMU{c: c, log: log, choose: proofs.of(c.QEMU.Accelerator, kvmprobe.ChooseAccelerator)}
}

// proofs are this process's, which serves one pod: a pod of the Sandbox API brings its
// configuration when the daemon has begun to prove KVM for its own.
var proofs choices

// choices are what machines run on, by the configured accelerator.
type choices struct{ byMode sync.Map }

// of returns the choice for a mode, which is made by the first that calls it. It is the same for all.
func (c *choices) of(mode string, choose func(ctx context.Context, mode string) (name, reason string, err error)) func() (accelerator, error) {
	f, _ := c.byMode.LoadOrStore(mode, sync.OnceValues(func() (accelerator, error) {
		name, reason, err := choose(context.Background(), mode)
		return accelerator{name, reason}, err
	}))
	return f.(func() (accelerator, error))
}

// accelerator is what a host's machines run on, and why.
type accelerator struct{ name, reason string }

type configuredQEMU struct {
	c      *config.Config
	log    *slog.Logger
	choose func() (accelerator, error) // once in this process; it takes 2 s at most (kvmprobe)

	accel  string               // chosen by the last Start
	clones *template.Hypervisor // set by the first Start when templates are enabled
}

// Start implements hypervisor.Hypervisor.
func (h *configuredQEMU) Start(ctx context.Context, vc hypervisor.Config) (hypervisor.VM, error) {
	b, err := h.backend(ctx, &vc)
	if err != nil {
		for _, s := range vc.Shares {
			s.Conn.Close()
		}
		closeNICs(vc.NICs)
		for _, d := range vc.Disks {
			d.Close()
		}
		return nil, &hypervisor.StartError{Phase: "config", Err: err}
	}
	if vc.Memory != nil || !h.c.Factory.EnableTemplate || h.c.QEMU.MachineType == qemu.MicroVM /* it takes no device after its boot */ || !h.ownSize(vc) {
		return b.Start(ctx, vc)
	}
	if err := h.withTemplates(b); err != nil {
		h.log.Warn("templates are of no use here, booting instead", "error", err)
		return b.Start(ctx, vc)
	}
	return h.clones.Start(ctx, vc)
}

// ownSize tells whether a machine starts with the size that the configuration
// gives to all. One of another size, which cannot grow to it, boots: there would be as many
// templates as sizes.
func (h *configuredQEMU) ownSize(vc hypervisor.Config) bool {
	cpus, _ := h.c.QEMU.CPUs(vc.CPUs)
	return vc.CPUs == cpus && vc.MemoryBytes == h.c.QEMU.MemoryBytes()
}

// withTemplates sets h.clones.
func (h *configuredQEMU) withTemplates(b *qemu.Hypervisor) error {
	if h.clones == nil {
		key, err := h.templateKey()
		if err != nil {
			return err
		}
		h.clones = &template.Hypervisor{Store: Templates(h.c), Key: key, Log: h.log}
	}
	h.clones.Base = b
	return nil
}

// Templates are those of a configuration.
func Templates(c *config.Config) *template.Store { return &template.Store{Dir: c.Factory.TemplatePath} }

// MakeTemplate makes the template from which pods of a configuration start, those
// of one container when alone is set, else those of several, unless it is there,
// and returns its digest.
func MakeTemplate(ctx context.Context, c *config.Config, hostCPUs int, alone bool, log *slog.Logger) (digest string, err error) {
	if c.QEMU.MachineType == qemu.MicroVM {
		return "", fmt.Errorf("hypervisor.qemu.machine_type is %q: templates need q35: %w", c.QEMU.MachineType, errdefs.ErrInvalidArgument)
	}
	host, err := hostOf(hostCPUs, 0)
	if err != nil {
		return "", err
	}
	h := newQEMU(c, log)
	vc := planVM(c, "template", "template", "", newSizer(host, boundsOf(c, host), demand{}))
	vc.HotplugPorts = hotplugPortsOf(c)
	vc.HotplugPorts = portsBeside(&vc, alone)
	b, err := h.backend(ctx, &vc)
	if err != nil {
		return "", err
	}
	if err := h.withTemplates(b); err != nil {
		return "", err
	}
	return h.clones.Make(ctx, vc)
}

// MakeTemplates makes both templates of a configuration and returns their digests.
func MakeTemplates(ctx context.Context, c *config.Config, hostCPUs int, log *slog.Logger) ([]string, error) {
	var digests []string
	for _, alone := range []bool{true, false} {
		digest, err := MakeTemplate(ctx, c, hostCPUs, alone, log)
		if err != nil {
			return nil, err
		}
		digests = append(digests, digest)
	}
	return digests, nil
}

// templateKey is what a template depends on beside the machine's configuration.
func (h *configuredQEMU) templateKey() (template.Key, error) {
	var k template.Key
	q := &h.c.QEMU
	k.Add("build", version.Get())
	k.Add("accelerator", h.accel)
	k.Add("machine", q.MachineType)
	k.Add("CPU features", q.CPUFeatures)
	return k, errors.Join(k.AddFile("VMM", q.Path), k.AddFile("firmware", q.Firmware), k.AddFile("manifest", h.c.ManifestPath()), k.AddCPU())
}

// machineKey is all that a machine depends on which is restored from a checkpoint.
func (h *configuredQEMU) machineKey(ctx context.Context, vc hypervisor.Config) (template.Key, error) {
	if _, err := h.backend(ctx, &vc); err != nil {
		return nil, err
	}
	k, err := h.templateKey()
	if err != nil {
		return nil, err
	}
	k.Add("kernel parameters", strings.Join(vc.KernelParams, " "))
	k.Add("vCPUs", fmt.Sprintf("%d of %d", vc.CPUs, vc.MaxCPUs))
	k.Add("memory", fmt.Sprintf("%d bytes", vc.MemoryBytes))
	k.Add("ports", vc.HotplugPorts+len(vc.Disks))
	k.Add("reports free memory", vc.ReclaimFreed)
	for i, n := range vc.NICs {
		k.Add(fmt.Sprintf("network device %d", i), fmt.Sprintf("%d queues", len(n.Taps))) // the guest is told its new address
	}
	return k, errors.Join(k.AddFile("kernel", vc.Kernel), k.AddFile("initrd", vc.Initrd))
}

// released waits until nothing is held for the machine, which has ended.
func (h *configuredQEMU) released() {
	if h.clones != nil {
		h.clones.Wait()
	}
}

// wantsTemplate tells, once, whether the machine could have been started from a
// template that is not there.
func (h *configuredQEMU) wantsTemplate() bool { return h.clones != nil && h.clones.Wanted() }

func (h *configuredQEMU) backend(ctx context.Context, vc *hypervisor.Config) (*qemu.Hypervisor, error) {
	q := &h.c.QEMU
	if err := h.c.CheckFiles(); err != nil {
		return nil, err
	}
	if err := verifyImages(h.c); err != nil {
		return nil, err
	}
	chosen, err := h.choose()
	if err != nil {
		return nil, err
	}
	accel := chosen.name
	h.accel = accel
	h.log.Info("accelerator chosen", "accelerator", accel, "configured", q.Accelerator, "reason", chosen.reason)
	if accel == qemu.KVM && vc.UID != 0 && qemu.KVMNeedsRoot() {
		h.log.Warn("only root can open /dev/kvm on this host, so the VMM runs as root; give its group read and write access")
		vc.UID, vc.GID = 0, 0
	}
	cpu := qemu.CPUModel(accel)
	if q.CPUFeatures != "" {
		cpu += "," + q.CPUFeatures
	}
	return qemu.New(qemu.Options{
		Path: q.Path, Accelerator: accel, Machine: q.MachineType, Firmware: q.Firmware, CPUModel: cpu, Log: h.log,
	}), nil
}

// verifiedDir, below the state directory, remembers which images were verified.
const verifiedDir = ".images"

// verifyImages compares the guest's files with the manifest, when there is one.
func verifyImages(c *config.Config) error {
	path := c.ManifestPath()
	if path == "" {
		return nil
	}
	m, err := images.ReadManifest(path)
	if err != nil {
		return err
	}
	dir := filepath.Join(c.Runtime.StateDir, verifiedDir)
	for key, file := range map[string]string{"hypervisor.qemu.kernel": c.QEMU.Kernel, "hypervisor.qemu.initrd": c.QEMU.Initrd} {
		if file == "" {
			continue
		}
		if err := m.VerifyCached(dir, file); err != nil {
			return fmt.Errorf("%s (set in %s): %w", key, c.Origin(key), err)
		}
	}
	return nil
}
