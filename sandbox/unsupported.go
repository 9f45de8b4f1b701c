// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/internal/config"
)

// CheckConfig refuses settings that are valid and that the pod cannot honour
// yet: ignored, they would make a machine other than the one asked for. The error
// names each key, where it was set and what works.
func CheckConfig(c *config.Config) error {
	var errs []error
	for _, k := range []struct {
		set          bool
		key, instead string
	}{
		{c.QEMU.Image != "", "hypervisor.qemu.image", "use initrd"},
		{len(c.Runtime.SandboxBindMounts) > 0, "runtime.sandbox_bind_mounts", "leave it empty"},
	} {
		if k.set {
			errs = append(errs, fmt.Errorf("%s (set in %s) is not implemented yet: %s: %w", k.key, c.Origin(k.key), k.instead, errdefs.ErrNotImplemented))
		}
	}
	return errors.Join(errs...)
}
