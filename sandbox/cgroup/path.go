// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Names of cgroups that this package makes up.
const (
	// Default is the parent of pods for which nobody chose one.
	Default = "/kata"
	// OverheadParent is the parent of what does not run the guest, when that is
	// not to be counted for the pod.
	OverheadParent = "/kata_overhead"
	// prefix begins the name of a pod's cgroup, as in Kata Containers.
	prefix = "kata_"
	// criPrefix is the one that containerd's CRI plugin gives a pod's scope (internal/cri/server, getCgroupsPath).
	criPrefix = "cri-containerd"
)

// Location is where a pod's cgroup goes.
type Location struct {
	// Path is the cgroup's, below the root of every hierarchy; absolute and clean.
	Path string
	// Slice and Unit name a scope of systemd, both empty for a plain directory.
	Slice, Unit string
}

// locate reads the forms of OCI's linux.cgroupsPath: an absolute path, a relative
// one, "slice:prefix:name" of systemd, or nothing. A plain path is that of the
// pod's first container, so the pod's cgroup lies beside it. field is named in errors.
func locate(field, p, pod string) (Location, error) {
	bad := func(why string) (Location, error) {
		return Location{}, fmt.Errorf("%s is %q: %s: %w", field, p, why, errdefs.ErrInvalidArgument)
	}
	if pod == "" || strings.ContainsAny(pod, "/\n\x00") {
		return Location{}, fmt.Errorf("sandbox id %q: must be a name without a slash: %w", pod, errdefs.ErrInvalidArgument)
	}
	switch {
	case p == "":
		return Location{Path: path.Join(Default, prefix+pod)}, nil
	case strings.ContainsAny(p, "\n\x00"):
		return bad("must hold neither a line break nor a NUL")
	case slices.Contains(strings.Split(p, "/"), ".."):
		return bad(`must not hold ".."`)
	case !strings.HasPrefix(p, "/") && strings.Contains(p, ":"):
		l, err := locateUnit(p)
		if err != nil {
			return bad(err.Error())
		}
		return l, nil
	case !strings.HasPrefix(p, "/"):
		p = path.Join(Default, p)
	}
	if p = path.Clean(p); p == "/" || p == Default {
		return bad("must name a cgroup below the root")
	}
	return Location{Path: path.Join(path.Dir(p), prefix+pod)}, nil
}

// locateParent is locate for a pod that is described by its parent alone, as in
// the CRI's cgroup_parent: a directory, or a path that ends in a slice.
func locateParent(field, parent, pod string) (Location, error) {
	switch base := path.Base(parent); {
	case parent == "":
		return locate(field, "", pod)
	case strings.HasSuffix(base, ".slice"):
		return locate(field, base+":"+criPrefix+":"+pod, pod)
	}
	return locate(field, parent+"/"+pod, pod)
}

// locateUnit reads "slice:prefix:name".
func locateUnit(p string) (Location, error) {
	part := strings.Split(p, ":")
	if len(part) != 3 {
		return Location{}, fmt.Errorf("%d colons: must be slice:prefix:name", len(part)-1)
	}
	for i, what := range []string{"slice", "prefix", "name"} {
		if part[i] == "" {
			return Location{}, fmt.Errorf("the %s is empty: must be slice:prefix:name", what)
		}
		if strings.Trim(part[i], unitChars) != "" {
			return Location{}, fmt.Errorf("the %s %q holds a character that no unit of systemd may have", what, part[i])
		}
	}
	dir, err := expandSlice(part[0])
	if err != nil {
		return Location{}, err
	}
	unit := part[1] + "-" + part[2] + ".scope"
	if len(unit) > 255 { // systemd's UNIT_NAME_MAX is 256 with the NUL
		return Location{}, fmt.Errorf("the unit's name would have %d bytes: at most 255", len(unit))
	}
	return Location{Path: path.Join(dir, unit), Slice: part[0], Unit: unit}, nil
}

// unitChars are what a unit's name may hold (systemd.unit(5)); the colon separates the parts here.
const unitChars = `abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-\@`

// expandSlice is the cgroup of a slice: a-b.slice lies in a.slice (systemd.slice(5)).
func expandSlice(slice string) (string, error) {
	name, ok := strings.CutSuffix(slice, ".slice")
	switch {
	case slice == "-.slice":
		return "/", nil
	case !ok || name == "":
		return "", fmt.Errorf("the slice %q: must be a name that ends in .slice", slice)
	case strings.HasPrefix(name, "-") || strings.HasSuffix(name, "-") || strings.Contains(name, "--"):
		return "", fmt.Errorf("the slice %q: a dash must stand between two names", slice)
	}
	dir, above := "/", ""
	for part := range strings.SplitSeq(name, "-") {
		above += part
		dir = path.Join(dir, above+".slice")
		above += "-"
	}
	return dir, nil
}
