// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Hierarchy is one mounted tree of cgroups.
type Hierarchy struct {
	// Mount is where it is mounted, Root the cgroup that is seen there.
	Mount, Root string
	// Controllers of version 1, "name=…" for a hierarchy without any; nil for version 2.
	Controllers []string
}

// Host is what a machine has of cgroups: either version 1 with or without a bare
// version 2 beside it ("hybrid"), or version 2 alone.
type Host struct {
	// V1 are the hierarchies with controllers.
	V1 []Hierarchy
	// Tracking are hierarchies beside V1 in which systemd tracks its units.
	Tracking []Hierarchy
	// V2 is the only hierarchy of a machine without version 1.
	V2 *Hierarchy
}

// Detect looks at the machine's mounts. A machine without cgroups is no error.
func Detect() (Host, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return Host{}, fmt.Errorf("cgroup hierarchies: %w", err)
	}
	defer f.Close()
	return parseMountinfo(f)
}

// parseMountinfo reads proc_pid_mountinfo(5): id, parent, device, root, mount point,
// options, optional fields up to a dash, type, source, super options.
func parseMountinfo(r io.Reader) (Host, error) {
	var h Host
	var unified *Hierarchy
	seen := map[string]bool{}
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		dash := slices.Index(f, "-")
		if dash < 6 || len(f) < dash+4 {
			continue
		}
		m := Hierarchy{Root: unescape(f[3]), Mount: unescape(f[4])}
		switch kind := f[dash+1]; {
		case kind == "cgroup2" && unified == nil:
			unified = &m
		case kind == "cgroup":
			m.Controllers = controllers(f[dash+3])
			key := strings.Join(m.Controllers, ",")
			switch {
			case key == "" || seen[key]:
			case strings.HasPrefix(key, "name="):
				if key == "name=systemd" {
					h.Tracking = append(h.Tracking, m)
				}
			default:
				h.V1 = append(h.V1, m)
			}
			seen[key] = true
		}
	}
	if err := sc.Err(); err != nil {
		return Host{}, fmt.Errorf("cgroup hierarchies: %w", err)
	}
	switch {
	case unified == nil:
	case len(h.V1) > 0:
		h.Tracking = append(h.Tracking, *unified)
	default:
		h.V2, h.Tracking = unified, nil
	}
	return h, nil
}

// known are the controllers of version 1 (kernel Documentation/admin-guide/cgroup-v1).
var known = []string{"blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "misc", "net_cls", "net_prio", "perf_event", "pids", "rdma"}

// controllers picks them from the options of a version 1 mount.
func controllers(options string) (out []string) {
	for o := range strings.SplitSeq(options, ",") {
		if slices.Contains(known, o) || strings.HasPrefix(o, "name=") {
			out = append(out, o)
		}
	}
	return out
}

func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// with finds the version 1 hierarchy of a controller.
func (h Host) with(controller string) (Hierarchy, bool) {
	i := slices.IndexFunc(h.V1, func(m Hierarchy) bool { return slices.Contains(m.Controllers, controller) })
	if i < 0 {
		return Hierarchy{}, false
	}
	return h.V1[i], true
}

// homes tells in which directory of each hierarchy a process is, by mount point.
// One outside what is mounted counts as in the mount's root.
func (h Host) homes(pid int) (map[string]string, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return nil, fmt.Errorf("own cgroups: %w", err)
	}
	// cgroups(7): hierarchy id, controllers, path; the middle one is empty for version 2.
	at := map[string]string{}
	for line := range strings.Lines(string(data)) {
		if f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3); len(f) == 3 {
			at[f[1]] = f[2]
		}
	}
	out := map[string]string{}
	for _, m := range h.all() {
		p := at[strings.Join(m.Controllers, ",")]
		rel, err := filepath.Rel(m.Root, p)
		if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
			rel = "."
		}
		out[m.Mount] = filepath.Join(m.Mount, rel)
	}
	return out, nil
}

// all are the hierarchies in which a pod may have a directory.
func (h Host) all() []Hierarchy {
	if h.V2 != nil {
		return []Hierarchy{*h.V2}
	}
	return append(slices.Clone(h.V1), h.Tracking...)
}
