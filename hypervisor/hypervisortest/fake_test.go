// SPDX-License-Identifier: Apache-2.0

package hypervisortest

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kata-v2/kata/hypervisor"
)

func TestFakeConformance(t *testing.T) {
	kernel := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(kernel, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	Run(t, Harness{
		Hypervisor:  &Fake{Guest: ServeTestPorts},
		Machine:     hypervisor.Config{Kernel: kernel, CPUs: 1, MemoryBytes: 64 << 20, UID: 65534, GID: 65534},
		Accelerator: FakeAccelerator,
		Timeout:     20 * time.Second,
	})
}
