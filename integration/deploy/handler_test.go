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

// Every containerd takes the handler that is installed for it.
func TestContainerdTakesTheHandler(t *testing.T) {
	lab := os.Getenv("KATA_LAB")
	if lab == "" {
		t.Fatal("KATA_LAB is not set: it names the directory with the built containerds; run by make")
	}
	for _, c := range []struct{ release, main string }{
		{"1.6", "version = 2\n"}, {"2.4", "version = 2\n"}, {"2.4", "version = 3\n"}, {"2.4", ""},
	} {
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
		_, handler, found := strings.Cut(string(out), "containerd.runtimes.kata]")
		handler, _, _ = strings.Cut(handler, "containerd.runtimes.runc")
		for _, want := range []string{"io.containerd.kata.v2", "privileged_without_host_devices = true", "io.katacontainers.*"} {
			if !found || !strings.Contains(handler, want) {
				t.Errorf("containerd %s with %q: %q is not in the handler %q", c.release, c.main, want, handler)
			}
		}
	}
}
