// SPDX-License-Identifier: Apache-2.0

package config

import (
	"strings"
	"testing"
)

// Templates are on where nothing excludes them; who asks for both is told.
func TestTemplatesByDefault(t *testing.T) {
	for body, want := range map[string]bool{
		"": true,
		"[hypervisor.qemu]\nenable_hugepages = true\n":    false,
		"[hypervisor.qemu]\nenable_mem_prealloc = true\n": false,
		"[factory]\nenable_template = false\n":            false,
	} {
		c, _, err := Load(LoadOptions{Body: []byte(body)})
		if err != nil || c.Factory.EnableTemplate != want {
			t.Errorf("%q: %v, %v; want %v", body, c.Factory.EnableTemplate, err, want)
		}
		if body == "" || !strings.Contains(body, "qemu") {
			continue
		}
		if _, _, err := Load(LoadOptions{Body: []byte(body + "[factory]\nenable_template = true\n")}); err == nil || !strings.Contains(err.Error(), "excludes enable_template") {
			t.Errorf("%q and templates: %v", body, err)
		}
	}
}
