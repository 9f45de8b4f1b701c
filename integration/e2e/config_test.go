// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestConfigurationSources: the file that containerd names, the drop-ins beside
// it and the pod's annotations, those that the operator has allowed, make one
// configuration, which the machine has.
func TestConfigurationSources(t *testing.T) {
	b := newBox(t)
	conf := b.configWith("hypervisor.qemu", "enable_annotations", `["default_memory"]`)
	dropins := filepath.Join(filepath.Dir(conf), "config.d")
	if err := os.Mkdir(dropins, 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, "[hypervisor.qemu]\ndefault_vcpus = 2\nkernel_params = \"from.dropin=1\"\n", dropins, "10.toml")
	const annotation = "io.katacontainers.config.hypervisor."
	flags := func(annotations ...string) []string {
		out := []string{"--runtime-config-path", conf}
		for _, a := range annotations {
			out = append(out, "--annotation", annotation+a)
		}
		return out
	}
	got := b.run("sources", flags("default_memory=384"), "sh", "-c", "nproc; cat /proc/cmdline; grep MemTotal /proc/meminfo")
	lines := strings.Split(strings.TrimSpace(got.Stdout), "\n")
	if got.Code != 0 || len(lines) != 3 {
		t.Fatalf("%+v", got)
	}
	if lines[0] != "2" || !strings.Contains(lines[1], "from.dropin=1") {
		t.Errorf("the drop-in says two vCPUs and a parameter; the guest has %q and %q", lines[0], lines[1])
	}
	kb, err := strconv.Atoi(strings.Fields(lines[2])[1])
	if err != nil || kb < 300<<10 || kb > 384<<10 {
		t.Errorf("the annotation says 384 MiB; the guest has %q", lines[2])
	}
	b.refused("an annotation that is not allowed", b.run("refused", flags("default_vcpus=4"), "true"), annotation+"default_vcpus", "enable_annotations")
	b.refused("an annotation out of range", b.run("refused", flags("default_memory=1"), "true"), annotation+"default_memory", "64")
	b.refused("an unknown annotation", b.run("refused", flags("default_memry=512"), "true"), annotation+"default_memry", "default_memory")
}
