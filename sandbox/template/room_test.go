// SPDX-License-Identifier: Apache-2.0

package template

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// A host that is short of memory makes no templates, and says of what.
func TestHostWithoutRoom(t *testing.T) {
	const mib = 1 << 20
	must(t, enough("/t", 192*mib, 448*mib, 256*mib))
	for want, err := range map[string]error{
		"/t (factory.template_path) has 191 MiB free": enough("/t", 191*mib, 1024*mib, 256*mib),
		"the host has 447 MiB of memory":              enough("/t", 1024*mib, 447*mib, 256*mib),
	} {
		if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
	meminfo := filepath.Join(t.TempDir(), "meminfo")
	must(t, os.WriteFile(meminfo, []byte("MemTotal:        8000 kB\nMemFree:         1 kB\nMemAvailable:    2048 kB\nBuffers: 5 kB\n"), 0o600))
	if n, err := availableMemory(meminfo); n != 2*mib || err != nil {
		t.Errorf("%d, %v; want 2 MiB", n, err)
	}
	must(t, os.WriteFile(meminfo, nil, 0o600))
	if _, err := availableMemory(meminfo); err == nil {
		t.Error("an empty file has an answer")
	}
	if n, err := availableMemory("/proc/meminfo"); n <= 0 || err != nil {
		t.Errorf("this host: %d, %v", n, err)
	}
}
