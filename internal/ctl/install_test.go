// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/sandbox/ledger"
)

// Uninstall looks for pods where the host's own configuration puts them, and
// leaves everything as it is while one runs.
func TestUninstallSparesRunningPods(t *testing.T) {
	t.Setenv(config.EnvFile, "")
	root := t.TempDir()
	conf := filepath.Join(root, config.SearchPaths()[0])
	program := filepath.Join(root, "usr/local/bin/kata-ctl")
	for path, text := range map[string]string{conf: "[runtime]\nstate_dir = \"/elsewhere\"\n", program: "x"} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	l, err := ledger.Create(filepath.Join(root, "elsewhere"), "key", ledger.Meta{Sandbox: "busy"})
	if err != nil {
		t.Fatal(err)
	}
	uninstall := func() (int, string) {
		var out, errs bytes.Buffer
		code := run(context.Background(), thisHost(), []string{"uninstall", "--root", root, "--no-containerd"}, &out, &errs)
		return code, errs.String()
	}
	if code, errs := uninstall(); code != 1 || !strings.Contains(errs, "busy") {
		t.Errorf("status %d, %q; want a refusal that names the pod", code, errs)
	}
	if !fileExists(program) {
		t.Error("the program is gone although a pod runs")
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if code, errs := uninstall(); code != 0 || fileExists(program) {
		t.Errorf("status %d, %q; want everything removed", code, errs)
	}
}
