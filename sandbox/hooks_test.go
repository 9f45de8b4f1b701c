// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func hookContainer() *Container {
	return &Container{id: "c1", bundle: "/bundle", s: New(Options{ID: "c1"}), spec: &specs.Spec{Annotations: map[string]string{"k": "v"}}}
}

func TestHooksGetTheState(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out")
	c := hookContainer()
	err := c.runHooks(context.Background(), "prestart", []specs.Hook{
		{Path: "/bin/sh", Args: []string{"sh", "-c", "cat > $OUT"}, Env: []string{"PATH=/bin:/usr/bin", "OUT=" + out}},
		{Path: "/bin/sh", Args: []string{"sh", "-c", "echo $HOME >> $OUT"}, Env: []string{"OUT=" + out}},
	}, specs.StateCreating)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	line, home, _ := strings.Cut(string(data), "\n")
	var s specs.State
	if err := json.Unmarshal([]byte(strings.TrimSuffix(line, home)), &s); err != nil {
		t.Fatalf("%v in %q", err, data)
	}
	if s.ID != "c1" || s.Bundle != "/bundle" || s.Status != specs.StateCreating || s.Annotations["k"] != "v" {
		t.Errorf("state %+v", s)
	}
	if strings.TrimSpace(home) != "" {
		t.Errorf("the hook saw our environment: HOME=%q", home)
	}
}

func TestHookFailures(t *testing.T) {
	one := 1
	for name, c := range map[string]struct {
		h    specs.Hook
		want string
		is   error
	}{
		"status":  {specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", "echo why >&2; exit 3"}}, "why", nil},
		"missing": {specs.Hook{Path: "/nonexistent"}, "/nonexistent", os.ErrNotExist},
		"slow":    {specs.Hook{Path: "/bin/sleep", Args: []string{"sleep", "100"}, Timeout: &one}, "hooks.createRuntime[0]", context.DeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			err := hookContainer().runHooks(context.Background(), "createRuntime", []specs.Hook{c.h}, specs.StateCreating)
			if err == nil || !strings.Contains(err.Error(), c.want) || (c.is != nil && !errors.Is(err, c.is)) {
				t.Errorf("got %v", err)
			}
		})
	}
}
