// SPDX-License-Identifier: Apache-2.0

// Package kvmprobe finds out whether KVM can run a real guest, by running one.
//
// That /dev/kvm opens, and even that it runs simple code, proves little: nested
// and software implementations exist that create a VM and then fail on
// instructions every kernel executes, after which a real guest spins for minutes.
// So Probe runs a micro-guest in 64-bit mode that executes CMPXCHG16B, XGETBV,
// XSETBV, XSAVE and XRSTOR, as far as KVM announces them in CPUID, and halts. It
// takes milliseconds and is bounded by Timeout.
package kvmprobe

import (
	"context"
	"fmt"
	"time"
)

// Device is KVM's device node.
const Device = "/dev/kvm"

// Timeout bounds the micro-guest's run.
const Timeout = 2 * time.Second

// Verdict is what Probe found.
type Verdict struct {
	// Usable says that KVM ran the micro-guest to its end.
	Usable bool
	// Reason is one sentence without a full stop: what failed, or what was run.
	Reason string
	// Took is the whole probe's duration.
	Took time.Duration
}

// Probe runs the micro-guest on the KVM device at path, Device if that is empty.
// Whatever is wrong with KVM, a missing device included, is a verdict; the error
// is ctx's only.
func Probe(ctx context.Context, path string) (Verdict, error) {
	if path == "" {
		path = Device
	}
	return probe(ctx, path, kernelLike, Timeout)
}

// ChooseAccelerator turns the configuration's accelerator, "kvm", "tcg" or "auto",
// into "kvm" or "tcg" and says why in one line for the log. "kvm" with unusable
// KVM is an error that names the key and what to do.
func ChooseAccelerator(ctx context.Context, mode string) (accel, reason string, err error) {
	return choose(ctx, mode, Device)
}

func choose(ctx context.Context, mode, path string) (accel, reason string, err error) {
	switch mode {
	case "tcg":
		return "tcg", `accelerator = "tcg" is configured`, nil
	case "kvm", "auto":
	default:
		return "", "", fmt.Errorf(`accelerator is one of "kvm", "tcg", "auto", not %q`, mode)
	}
	v, err := Probe(ctx, path)
	switch {
	case err != nil:
		return "", "", fmt.Errorf("probe KVM: %w", err)
	case v.Usable:
		return "kvm", v.Reason, nil
	case mode == "auto":
		return "tcg", "KVM is not usable: " + v.Reason, nil
	}
	return "", "", fmt.Errorf(`accelerator = "kvm" and KVM is not usable: %s; %s`, v.Reason, Fix)
}

// Fix is what to do about unusable KVM.
const Fix = `enable hardware virtualisation (firmware setup, the kvm_intel or kvm_amd module, nested virtualisation on a virtual host), ` +
	`or set accelerator = "auto" or "tcg" in [hypervisor.qemu] to emulate in software, many times slower`
