// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
)

// OOM says that the host's kernel has killed processes of the pod for want of
// memory; nil if it has not, or does not count. It must be asked before Close.
func (g *Group) OOM() error {
	for _, d := range g.processDirs() {
		if !d.has("memory") {
			continue
		}
		// "oom_kill <n>": a line of memory.events (cgroup-v2.rst) and of memory.oom_control (cgroup-v1/memory.rst).
		file := "memory.oom_control"
		if d.V2 {
			file = "memory.events"
		}
		text, err := readFile(d.Path, file)
		if err != nil {
			return nil
		}
		if n := counter(text, "oom_kill"); n > 0 {
			return fmt.Errorf("the host's kernel killed %d of the pod's processes for want of memory (%s)", n, d.tightest())
		}
	}
	return nil
}

func counter(text, key string) int {
	for line := range strings.Lines(text) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), " "); ok && k == key {
			n, _ := strconv.Atoi(v)
			return n
		}
	}
	return 0
}

// tightest describes the lowest limit of memory of d and what is above it.
func (d Dir) tightest() string {
	file, unlimited := "memory.limit_in_bytes", isHuge
	if d.V2 {
		file, unlimited = "memory.max", isMax
	}
	least, at := uint64(0), ""
	for p := d.Path; strings.HasPrefix(p, d.Mount+"/"); p = filepath.Dir(p) {
		s, err := readFile(p, file)
		if err != nil || unlimited(s) {
			continue
		}
		if n, err := strconv.ParseUint(s, 10, 64); err == nil && (at == "" || n < least) {
			least, at = n, p
		}
	}
	if at == "" {
		return "no cgroup limits it, so the host itself ran out"
	}
	return fmt.Sprintf("limit %d bytes of %s", least, strings.TrimPrefix(at, d.Mount))
}
