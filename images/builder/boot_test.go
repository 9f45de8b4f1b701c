// SPDX-License-Identifier: Apache-2.0

package builder

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kata-v2/kata/images"
	"github.com/kata-v2/kata/images/modules"
)

// TestEveryModuleLoads builds the images of the real kernel package with a first
// process that loads all modules, boots them, and reads the verdicts: it proves
// that the extracted kernel starts through PVH, that the order is right and that
// what was stripped from the modules is not needed.
func TestEveryModuleLoads(t *testing.T) {
	release := os.Getenv("KATA_TEST_MODULES")
	if release == "" {
		if testing.Short() {
			t.Skip("KATA_TEST_MODULES is unset and -short is given: the test boots the kernel that scripts/setup.sh unpacks")
		}
		t.Fatal("KATA_TEST_MODULES is unset: run the tests by `make test`, or give -short")
	}
	release, err := filepath.EvalSymlinks(release)
	if err != nil {
		t.Fatal(err)
	}
	o := options(t, 1)
	o.KernelPackage = filepath.Join(release, "..", "..", "..") // <package>/lib/modules/<release>
	o.Modules = nil
	o.Agent = filepath.Join(t.TempDir(), "init")
	build := exec.Command("go", "build", "-o", o.Agent, "./testdata/init")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	if _, err := Build(o); err != nil {
		t.Fatal(err)
	}
	console := boot(t, o.Out)
	picked, err := modules.Pick(release, modules.Default)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range picked {
		if !strings.Contains(console, "module "+m.File+" <nil>") {
			t.Errorf("%s did not load", m.File)
		}
	}
	if t.Failed() || !strings.Contains(console, "all modules done") {
		t.Fatalf("guest console:\n%s", console)
	}
}

// boot runs the images to the end of the guest and returns its console. Emulation
// is slow but there on every machine; cx16 is off because QEMU 7.2's is broken.
func boot(t *testing.T, dir string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35", "-accel", "tcg", "-cpu", "max,-cx16", "-m", "256", "-smp", "1", "-serial", "stdio",
		"-kernel", filepath.Join(dir, images.KernelFile), "-initrd", filepath.Join(dir, images.InitrdFile),
		"-append", "console=ttyS0 quiet panic=1 reboot=t")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("qemu: %v; output:\n%s", err, out)
	}
	return string(out)
}
