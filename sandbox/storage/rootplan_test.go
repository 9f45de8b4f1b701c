// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// The mounts are those that containerd 2.4's snapshotters hand over.
func erofsLayer(n int, more ...string) Mount {
	return Mount{Type: "erofs", Source: fmt.Sprintf("/s/%d/layer.erofs", n), Options: append([]string{"ro", "loop"}, more...)}
}

func TestPlanRoot(t *testing.T) {
	upper := Mount{Type: "ext4", Source: "/s/9/rwlayer.img", Options: []string{"rw", "loop"}}
	lower := func(n int) Layer {
		return Layer{Type: "erofs", Source: fmt.Sprintf("/s/%d/layer.erofs", n), Options: []string{"ro"}}
	}
	merged := erofsLayer(4, "device=/s/1/layer.erofs", "device=/s/2/layer.erofs")
	for name, c := range map[string]struct {
		mounts []Mount
		want   *Root
		reason string
	}{
		"layers, written in a directory of the host": {
			[]Mount{erofsLayer(2), erofsLayer(1), {Type: "format/mkdir/overlay", Source: "overlay", Options: []string{"workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir={{ overlay 0 1 }}", "index=off"}}},
			&Root{Lowers: []Layer{lower(2), lower(1)}, Options: []string{"index=off"}}, "2 layers of type erofs, written in guest memory",
		},
		"layers, written to an ext4": {
			[]Mount{upper, erofsLayer(2), erofsLayer(1), {Type: "format/mkdir/overlay", Options: []string{
				"X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "workdir={{ mount 0 }}/work", "upperdir={{ mount 0 }}/upper", "lowerdir={{ overlay 1 2 }}"}}},
			&Root{Lowers: []Layer{lower(2), lower(1)}, Upper: &Layer{Type: "ext4", Source: "/s/9/rwlayer.img", Options: []string{"rw"}}},
			"2 layers of type erofs, written to a disk of type ext4",
		},
		"one layer": {
			[]Mount{erofsLayer(1), {Type: "format/mkdir/overlay", Options: []string{"upperdir=/s/3/fs", "lowerdir={{ mount 0 }}"}}},
			&Root{Lowers: []Layer{lower(1)}}, "1 layers of type erofs, written in guest memory",
		},
		"a view of several": {
			[]Mount{erofsLayer(2), erofsLayer(1), {Type: "format/mkdir/overlay", Options: []string{"lowerdir={{ overlay 1 0 }}", "ro"}}},
			&Root{Lowers: []Layer{lower(1), lower(2)}, ReadOnly: true}, "2 read-only layers of type erofs",
		},
		"a view of one": {[]Mount{erofsLayer(1)}, &Root{Lowers: []Layer{lower(1)}, ReadOnly: true}, "1 read-only layers of type erofs"},
		"a bound view": {
			[]Mount{erofsLayer(1), {Type: "format/bind", Source: "{{ mount 0 }}", Options: []string{"ro", "rbind"}}},
			&Root{Lowers: []Layer{lower(1)}, ReadOnly: true}, "1 read-only layers of type erofs",
		},
		"merged metadata": {
			[]Mount{merged, {Type: "format/mkdir/overlay", Options: []string{"upperdir=/s/3/fs", "lowerdir={{ mount 0 }}"}}},
			&Root{Lowers: []Layer{{Type: "erofs", Source: "/s/4/layer.erofs", Devices: []string{"/s/1/layer.erofs", "/s/2/layer.erofs"}, Options: []string{"ro"}}}},
			"1 layers of type erofs (merged: 2 devices), written in guest memory",
		},
		"dm-verity of merged metadata": {
			[]Mount{erofsLayer(3, "device=/s/1/layer.erofs", "X-containerd.dmverity=/s/3/layer.erofs.dmverity"), {Type: "format/mkdir/overlay", Options: []string{"lowerdir={{ mount 0 }}"}}},
			&Root{Lowers: []Layer{{Type: "erofs", Source: "/s/3/layer.erofs", Devices: []string{"/s/1/layer.erofs"}, Verity: "/s/3/layer.erofs.dmverity", Options: []string{"ro"}}}, ReadOnly: true},
			"1 read-only layers of type erofs (merged: 1 devices)",
		},
		"dm-verity": {
			[]Mount{erofsLayer(1, "X-containerd.dmverity=/s/1/layer.erofs.dmverity"), {Type: "format/mkdir/overlay", Options: []string{"upperdir=/u", "lowerdir={{ mount 0 }}"}}},
			&Root{Lowers: []Layer{{Type: "erofs", Source: "/s/1/layer.erofs", Verity: "/s/1/layer.erofs.dmverity", Options: []string{"ro"}}}},
			"1 layers of type erofs, written in guest memory",
		},
		"an image without layers": {
			[]Mount{upper, {Type: "format/mkdir/bind", Source: "{{ mount 0 }}/upper", Options: []string{"X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "rw", "rbind"}}},
			&Root{Upper: &Layer{Type: "ext4", Source: "/s/9/rwlayer.img", Options: []string{"rw"}}, Dir: "upper"}, "a disk of type ext4",
		},
		"blockfile": {
			[]Mount{{Type: "ext4", Source: "/s/7", Options: []string{"loop", "sync"}}},
			&Root{Upper: &Layer{Type: "ext4", Source: "/s/7", Options: []string{"sync"}}}, "a disk of type ext4",
		},
		"devmapper, read-only": {
			[]Mount{{Type: "xfs", Source: "/dev/mapper/x", Options: []string{"ro"}}},
			&Root{Upper: &Layer{Type: "xfs", Source: "/dev/mapper/x", Options: []string{"ro", "nouuid"}}, ReadOnly: true}, "a disk of type xfs",
		},
		"overlayfs":  {[]Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/a:/b"}}}, nil, "a mount of type overlay"},
		"native":     {[]Mount{{Type: "bind", Source: "/s/1", Options: []string{"rbind"}}}, nil, "a mount of type bind"},
		"no mounts":  {nil, nil, "a directory of the bundle"},
		"own target": {[]Mount{{Type: "bind", Source: "/a"}, {Type: "bind", Source: "/b", Target: "sub"}}, nil, "rootfs[1] has a target of its own"},
	} {
		t.Run(name, func(t *testing.T) {
			got, reason, err := PlanRoot(c.mounts)
			if err != nil || reason != c.reason || !reflect.DeepEqual(got, c.want) {
				t.Errorf("got %+v, %q, %v\nwant %+v, %q", got, reason, err, c.want, c.reason)
			}
		})
	}
}

func TestPlanRootRefuses(t *testing.T) {
	over := func(options ...string) []Mount {
		return []Mount{erofsLayer(1), {Type: "format/mkdir/overlay", Options: options}}
	}
	for name, c := range map[string]struct {
		mounts []Mount
		want   string
	}{
		"no lower":            {over("upperdir=/u"), "without lowerdir"},
		"lower beyond":        {over("lowerdir={{ overlay 0 1 }}"), `"lowerdir={{ overlay 0 1 }}"`},
		"itself":              {over("lowerdir={{ mount 1 }}"), `"lowerdir={{ mount 1 }}"`},
		"another function":    {over("lowerdir={{ source 0 }}"), "{{ source 0 }}"},
		"overflow":            {over("lowerdir={{ mount 99999999999999999999 }}"), "99999"},
		"a path that climbs":  {over("lowerdir={{ mount 0 }}", "upperdir={{ mount 0 }}/../x"), "upperdir"},
		"upper on a layer":    {over("lowerdir={{ mount 0 }}", "upperdir={{ mount 0 }}/upper"), "read-only"},
		"mapped ids":          {over("lowerdir={{ mount 0 }}", "uidmap=0:1:2"), "uidmap"},
		"unknown transform":   {[]Mount{{Type: "mkfs/loop", Source: "/x"}}, `"mkfs/loop"`},
		"a list":              {[]Mount{erofsLayer(1), {Type: "overlay"}}, `"overlay" after 1`},
		"unknown lower":       {[]Mount{{Type: "tmpfs"}, {Type: "format/overlay", Options: []string{"lowerdir={{ mount 0 }}"}}}, `rootfs[0]: type "tmpfs"`},
		"unknown option":      {[]Mount{erofsLayer(1, "X-containerd.new=1")}, "X-containerd.new=1"},
		"bound to nothing":    {[]Mount{erofsLayer(1), {Type: "format/bind", Source: "/x"}}, `source "/x"`},
		"directory of a view": {[]Mount{erofsLayer(1), {Type: "format/bind", Source: "{{ mount 0 }}/sub"}}, "read-only layer"},
	} {
		t.Run(name, func(t *testing.T) {
			got, _, err := PlanRoot(c.mounts)
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "rootfs[") {
				t.Errorf("got %+v, %v; want an error with %q", got, err, c.want)
			}
			if !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err) {
				t.Errorf("%v has no kind", err)
			}
		})
	}
}
