// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/internal/config"
)

func TestCheckConfig(t *testing.T) {
	for body, key := range map[string]string{
		"":                                  "",
		"[hypervisor.qemu]\nimage = \"/i\"": "hypervisor.qemu.image",
		"[runtime]\nsandbox_bind_mounts = [\"/x\"]": "runtime.sandbox_bind_mounts",
	} {
		c, _, err := config.Load(config.LoadOptions{Body: []byte(body)})
		if err != nil {
			t.Fatalf("%q: %v", body, err)
		}
		err = CheckConfig(c)
		if key == "" && err != nil || key != "" && (!errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), key)) {
			t.Errorf("%q: got %v, want an error that names %q", body, err, key)
		}
	}
}
