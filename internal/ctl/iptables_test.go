// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestIPTablesNamesWhatIsWrong(t *testing.T) {
	w := newWorld(t)
	for want, args := range map[string][]string{
		`"sandbox-id" not set`: {"get"},
		`no pod "nobody" runs`: {"get", "--sandbox-id", "nobody"},
		"nowhere/rules":        {"set", "--sandbox-id", "nobody", "/nowhere/rules"},
		"accepts 1 arg":        {"set", "--sandbox-id", "nobody"},
	} {
		if code, _, errs := w.run(append([]string{"iptables"}, args...)...); code == 0 || !strings.Contains(errs, want) {
			t.Errorf("%q: status %d, %q; want %q", args, code, errs, want)
		}
	}
}

func TestRulesAreBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "rules")
	if err := os.WriteFile(path, []byte("*nat\nCOMMIT\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := readRules(path, nil); err != nil || string(got) != "*nat\nCOMMIT\n" {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := readRules("-", strings.NewReader("x")); err != nil || string(got) != "x" {
		t.Errorf("standard input: %q, %v", got, err)
	}
	for _, text := range []string{"", strings.Repeat("x", maxRules+1)} {
		if _, err := readRules("-", strings.NewReader(text)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%d bytes: %v; want them refused", len(text), err)
		}
	}
}
