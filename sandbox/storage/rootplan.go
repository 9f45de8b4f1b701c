// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Mount types and options of containerd's mount manager (containerd docs/mounts.md).
const (
	transformFormat = "format/"
	transformMkdir  = "mkdir/"
	optionMkdir     = "X-containerd.mkdir."
	optionVerity    = "X-containerd.dmverity="
	optionDevice    = "device="
)

// Root says what a root filesystem consists of that reaches the guest on disks.
type Root struct {
	// Lowers are the read-only layers, the topmost first.
	Lowers []Layer
	// Upper takes what is written; nil means the guest's memory, unless ReadOnly.
	Upper *Layer
	// Dir is the directory of Upper that is the root, for one without Lowers; empty
	// for the whole of it.
	Dir string
	// ReadOnly is a root that nothing is written to.
	ReadOnly bool
	// Options are more options of the overlay.
	Options []string
}

// Layer is a filesystem in a file or on a block device of the host.
type Layer struct {
	// Type is "erofs", "ext4" or "xfs".
	Type string
	// Source is the path of the file or block device.
	Source string
	// Devices are the files with the data of an EROFS that holds metadata only, in
	// the order of its device table.
	Devices []string
	// Verity is the path of the layer's dm-verity metadata, empty for none. That of an
	// EROFS with Devices lies beside each of the files, whose names with veritySuffix it
	// has: no mount of containerd's tells it.
	Verity string
	// Options are the mount options for the guest.
	Options []string
}

// blockTypes are the filesystems that the guest mounts from a disk.
var blockTypes = []string{"erofs", "ext4", "xfs"}

// PlanRoot tells how the mounts of a root filesystem reach the guest: as disks,
// or through the share when the result is nil. The reason is for the log. It is a
// pure function of what containerd's snapshotters hand over: erofs gives a mount
// for each layer, maybe an ext4 for what is written, and a last one that names
// them by index; blockfile and devmapper give one mount of a device.
func PlanRoot(mounts []Mount) (root *Root, reason string, err error) {
	if len(mounts) == 0 {
		return nil, "a directory of the bundle", nil
	}
	for i, m := range mounts {
		if m.Target != "" {
			return nil, fmt.Sprintf("rootfs[%d] has a target of its own", i), nil
		}
	}
	last := mounts[len(mounts)-1]
	kind := strings.TrimPrefix(strings.TrimPrefix(last.Type, transformFormat), transformMkdir)
	templated := strings.HasPrefix(last.Type, transformFormat)
	switch {
	case len(mounts) == 1 && slices.Contains(blockTypes, last.Type):
		root, err = wholeRoot(last)
	case templated && kind == "overlay":
		root, err = overlayRoot(mounts, last)
	case templated && (kind == "bind" || kind == "rbind"):
		root, err = boundRoot(mounts, last)
	case templated || strings.Contains(last.Type, "/") || len(mounts) > 1:
		err = fmt.Errorf("rootfs[%d]: a mount of type %q after %d others is not known here: want format/mkdir/overlay or format/bind: %w",
			len(mounts)-1, last.Type, len(mounts)-1, errdefs.ErrNotImplemented)
	default:
		return nil, "a mount of type " + last.Type, nil
	}
	if err != nil {
		return nil, "", err
	}
	return root, root.String(), nil
}

// String describes the root for the log.
func (r *Root) String() string {
	switch {
	case len(r.Lowers) == 0:
		return "a disk of type " + r.Upper.Type
	case r.ReadOnly:
		return fmt.Sprintf("%d read-only layers of type erofs%s", len(r.Lowers), r.merged())
	case r.Upper == nil:
		return fmt.Sprintf("%d layers of type erofs%s, written in guest memory", len(r.Lowers), r.merged())
	}
	return fmt.Sprintf("%d layers of type erofs%s, written to a disk of type %s", len(r.Lowers), r.merged(), r.Upper.Type)
}

// merged says how many layers are devices of others.
func (r *Root) merged() string {
	n := 0
	for _, l := range r.Lowers {
		n += len(l.Devices)
	}
	if n == 0 {
		return ""
	}
	return fmt.Sprintf(" (merged: %d devices)", n)
}

// wholeRoot is one filesystem as it is.
func wholeRoot(m Mount) (*Root, error) {
	l, err := layer(0, m)
	if err != nil {
		return nil, err
	}
	if l.Type == "erofs" {
		return &Root{Lowers: []Layer{l}, ReadOnly: true}, nil
	}
	return &Root{Upper: &l, ReadOnly: slices.Contains(l.Options, "ro")}, nil
}

// layer reads a mount of a filesystem that lies on a disk.
func layer(i int, m Mount) (Layer, error) {
	l := Layer{Type: m.Type, Source: m.Source}
	if !slices.Contains(blockTypes, m.Type) {
		return l, fmt.Errorf("rootfs[%d]: type %q: want one of %q below an overlay of disks: %w", i, m.Type, blockTypes, errdefs.ErrNotImplemented)
	}
	for _, o := range m.Options {
		device, isDevice := strings.CutPrefix(o, optionDevice)
		verity, isVerity := strings.CutPrefix(o, optionVerity)
		switch {
		case isDevice && m.Type == "erofs":
			l.Devices = append(l.Devices, device)
		case isVerity:
			l.Verity = verity
		case o == "loop": // the guest has a disk
		case strings.HasPrefix(o, "X-containerd."):
			return l, fmt.Errorf("rootfs[%d]: option %q is not known here: %w", i, o, errdefs.ErrNotImplemented)
		default:
			l.Options = append(l.Options, o)
		}
	}
	if m.Type == "xfs" && !slices.Contains(l.Options, "nouuid") {
		// Snapshots are copies of one file system; a guest has those of several containers.
		l.Options = append(l.Options, "nouuid")
	}
	return l, nil
}

var (
	mountRef   = regexp.MustCompile(`^\{\{\s*mount\s+(\d+)\s*\}\}((?:/[\w.-]+)*)$`)
	overlayRef = regexp.MustCompile(`^\{\{\s*overlay\s+(\d+)\s+(\d+)\s*\}\}$`)
)

// reference reads "{{ mount N }}", with a directory below it or not.
func reference(s string, count int) (index int, dir string, ok bool) {
	m := mountRef.FindStringSubmatch(s)
	if m == nil {
		return 0, "", false
	}
	n, err := strconv.Atoi(m[1])
	dir = strings.TrimPrefix(m[2], "/")
	if err != nil || n >= count || dir != "" && !filepath.IsLocal(dir) {
		return 0, "", false
	}
	return n, dir, true
}

// lowerRefs reads the value of lowerdir: "{{ overlay FIRST LAST }}", in either
// direction, or one "{{ mount N }}".
func lowerRefs(s string, count int) ([]int, bool) {
	if n, dir, ok := reference(s, count); ok && dir == "" {
		return []int{n}, true
	}
	m := overlayRef.FindStringSubmatch(s)
	if m == nil {
		return nil, false
	}
	first, err1 := strconv.Atoi(m[1])
	last, err2 := strconv.Atoi(m[2])
	if err1 != nil || err2 != nil || first >= count || last >= count {
		return nil, false
	}
	step := 1
	if first > last {
		step = -1
	}
	refs := []int{first}
	for first != last {
		first += step
		refs = append(refs, first)
	}
	return refs, true
}

// overlayRoot is an overlay over the mounts before it.
func overlayRoot(mounts []Mount, m Mount) (*Root, error) {
	at, r := len(mounts)-1, &Root{}
	bad := func(o string) error {
		return fmt.Errorf("rootfs[%d]: option %q does not name mounts before it: %w", at, o, errdefs.ErrInvalidArgument)
	}
	upper, written := -1, false
	for _, o := range m.Options {
		key, value, _ := strings.Cut(o, "=")
		switch key {
		case "lowerdir":
			refs, ok := lowerRefs(value, at)
			if !ok {
				return nil, bad(o)
			}
			for _, n := range refs {
				l, err := layer(n, mounts[n])
				if err != nil {
					return nil, err
				}
				r.Lowers = append(r.Lowers, l)
			}
		case "upperdir":
			written = true
			if n, _, ok := reference(value, at); ok {
				upper = n
			} else if strings.Contains(value, "{{") {
				return nil, bad(o)
			}
		case "workdir", "ro", "rw": // the work directory lies beside the upper one
		case "uidmap", "gidmap":
			return nil, fmt.Errorf("rootfs[%d]: option %q: user namespaces are not supported: %w", at, o, errdefs.ErrInvalidArgument)
		default:
			if !strings.HasPrefix(o, optionMkdir) {
				r.Options = append(r.Options, o)
			}
		}
	}
	if len(r.Lowers) == 0 {
		return nil, fmt.Errorf("rootfs[%d]: an overlay without lowerdir: %w", at, errdefs.ErrInvalidArgument)
	}
	r.ReadOnly = !written
	if upper >= 0 {
		l, err := layer(upper, mounts[upper])
		if err != nil {
			return nil, err
		}
		if l.Type == "erofs" {
			return nil, fmt.Errorf("rootfs[%d]: the upper directory is on rootfs[%d], which is read-only: %w", at, upper, errdefs.ErrInvalidArgument)
		}
		r.Upper = &l
	}
	return r, nil
}

// boundRoot is one of the mounts before it, or a directory of it.
func boundRoot(mounts []Mount, m Mount) (*Root, error) {
	at := len(mounts) - 1
	n, dir, ok := reference(m.Source, at)
	if !ok {
		return nil, fmt.Errorf("rootfs[%d]: source %q does not name a mount before it: %w", at, m.Source, errdefs.ErrInvalidArgument)
	}
	r, err := wholeRoot(mounts[n])
	if err != nil {
		return nil, err
	}
	if dir != "" && r.Upper == nil {
		return nil, fmt.Errorf("rootfs[%d]: source %q: a directory of a read-only layer: %w", at, m.Source, errdefs.ErrNotImplemented)
	}
	r.Dir = dir
	r.ReadOnly = r.ReadOnly || slices.Contains(m.Options, "ro")
	return r, nil
}
