// SPDX-License-Identifier: Apache-2.0

// Package deploy tests the files of deploy/ with the programs that read them.
package deploy

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kata-v2/kata/deploy"
)

// Every containerd takes the handler that is installed for it, and keeps what else it was told.
func TestContainerdTakesTheHandler(t *testing.T) {
	lab := os.Getenv("KATA_LAB")
	if lab == "" {
		t.Fatal("KATA_LAB is not set: it names the directory with the built containerds; run by make")
	}
	const cri2 = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"kept\"\n" +
		"[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n"
	const cri3 = "version = 3\n[plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = 'kept'\n"
	cases := []struct{ release, main string }{
		{"1.6", cri2}, {"2.4", cri2}, {"2.4", cri3}, {"2.4", ""}, {"1.6", ""},
	}
	if os.Getenv("KATA_TEST_ALL") != "" { // those whose CRI only `make test-all` sets up
		cases = append(cases, []struct{ release, main string }{
			{"1.7-cri", cri2}, {"1.7-cri", ""}, {"2.2-cri", cri2}, {"2.2-cri", cri3}, {"2.2-cri", ""},
		}...)
	}
	for _, c := range cases {
		root := t.TempDir()
		path := filepath.Join(root, "etc/containerd/config.toml")
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(c.main), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := deploy.AddHandler(root); err != nil {
			t.Fatal(err)
		}
		daemon := filepath.Join(lab, "containerd-"+c.release, "containerd")
		out, err := exec.Command(daemon, "--config", path, "config", "dump").CombinedOutput()
		if err != nil {
			t.Fatalf("containerd %s: %v: %s", c.release, err, out)
		}
		if c.main != "" && !strings.Contains(string(out), "kept") {
			t.Errorf("containerd %s with %q: the rest of the CRI's configuration is lost", c.release, c.main)
		}
		_, handler, found := strings.Cut(string(out), "containerd.runtimes.kata]")
		handler, _, _ = strings.Cut(handler, "containerd.runtimes.runc")
		for _, want := range []string{"io.containerd.kata.v2", "privileged_without_host_devices = true", "io.katacontainers.*"} {
			if !found || !strings.Contains(handler, want) {
				t.Errorf("containerd %s with %q: %q is not in the handler %q", c.release, c.main, want, handler)
			}
		}
	}
}
