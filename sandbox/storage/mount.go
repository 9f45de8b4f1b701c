// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Mount is one mount of a root filesystem, as containerd hands it over:
// a type, a source and mount(8) options.
type Mount struct {
	Type, Source, Target string
	Options              []string
}

// flagOptions are the mount(8) options that are flags of mount(2), with the
// bit and whether the option clears it (mount(8), FILESYSTEM-INDEPENDENT MOUNT OPTIONS).
var flagOptions = map[string]struct {
	flag  uintptr
	clear bool
}{
	"async": {unix.MS_SYNCHRONOUS, true}, "atime": {unix.MS_NOATIME, true}, "bind": {unix.MS_BIND, false},
	"defaults": {0, false}, "dev": {unix.MS_NODEV, true}, "diratime": {unix.MS_NODIRATIME, true},
	"dirsync": {unix.MS_DIRSYNC, false}, "exec": {unix.MS_NOEXEC, true}, "mand": {unix.MS_MANDLOCK, false},
	"noatime": {unix.MS_NOATIME, false}, "nodev": {unix.MS_NODEV, false}, "nodiratime": {unix.MS_NODIRATIME, false},
	"noexec": {unix.MS_NOEXEC, false}, "nomand": {unix.MS_MANDLOCK, true}, "norelatime": {unix.MS_RELATIME, true},
	"nostrictatime": {unix.MS_STRICTATIME, true}, "nosuid": {unix.MS_NOSUID, false}, "rbind": {unix.MS_BIND | unix.MS_REC, false},
	"relatime": {unix.MS_RELATIME, false}, "remount": {unix.MS_REMOUNT, false}, "ro": {unix.MS_RDONLY, false},
	"rw": {unix.MS_RDONLY, true}, "strictatime": {unix.MS_STRICTATIME, false}, "suid": {unix.MS_NOSUID, true},
	"sync": {unix.MS_SYNCHRONOUS, false},
}

// parseOptions splits mount(8) options into mount(2) flags and data.
func parseOptions(options []string) (flags uintptr, data []string) {
	for _, o := range options {
		f, ok := flagOptions[o]
		switch {
		case !ok:
			data = append(data, o)
		case f.clear:
			flags &^= f.flag
		default:
			flags |= f.flag
		}
	}
	return flags, data
}

// mountAll mounts a root filesystem at target. All of it is undone when a part fails.
func (h *hostMounts) mountAll(mounts []Mount, target string) (err error) {
	done := 0
	defer func() {
		for ; err != nil && done > 0; done-- {
			unix.Unmount(target, unix.MNT_DETACH)
		}
	}()
	for i, m := range mounts {
		dst := target
		if m.Target != "" {
			if dst, err = inside(target, m.Target); err != nil {
				return fmt.Errorf("rootfs mount %d: %w", i, err)
			}
		}
		if err = h.mountOne(m, dst); err != nil {
			return fmt.Errorf("rootfs mount %d: %s of %q: %w", i, m.Type, m.Source, err)
		}
		done++
	}
	return nil
}

// inside joins rel below root without following symbolic links out of it.
func inside(root, rel string) (string, error) {
	p := filepath.Join(root, filepath.Clean("/"+rel))
	r, err := filepath.EvalSymlinks(p)
	if err != nil {
		return "", err
	}
	if r != root && !strings.HasPrefix(r, root+"/") {
		return "", fmt.Errorf("target %q leaves the root filesystem", rel)
	}
	return r, nil
}

func (h *hostMounts) mountOne(m Mount, target string) error {
	flags, data := parseOptions(m.Options)
	fstype := m.Type
	if fstype == "bind" || fstype == "rbind" {
		flags |= unix.MS_BIND
		fstype = ""
	}
	if flags&unix.MS_BIND != 0 {
		return h.bind(m.Source, target, flags)
	}
	dir, s := "", strings.Join(data, ",")
	// mount(2) takes one page of data; many layers exceed it.
	if most := os.Getpagesize() - 1; len(s) >= most {
		var short []string
		dir, short = shorten(data)
		if s = strings.Join(short, ","); dir == "" || len(s) >= most {
			return fmt.Errorf("mount options of %d bytes exceed one page", len(s))
		}
	}
	fd, err := h.filesystem(func(at string) error {
		if dir != "" {
			if err := unix.Chdir(dir); err != nil {
				return err
			}
		}
		return unix.Mount(m.Source, at, fstype, flags, s)
	})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return place(fd, target, flags)
}

// shorten makes the directories of lowerdir= relative to their common parent, to
// be the working directory while they are mounted.
func shorten(data []string) (dir string, out []string) {
	for _, o := range data {
		lower, ok := strings.CutPrefix(o, "lowerdir=")
		if !ok {
			out = append(out, o)
			continue
		}
		layers := strings.Split(lower, ":")
		dir = filepath.Dir(layers[0])
		for _, l := range layers {
			for dir != "/" && !strings.HasPrefix(l, dir+"/") {
				dir = filepath.Dir(dir)
			}
		}
		for i, l := range layers {
			layers[i] = strings.TrimPrefix(strings.TrimPrefix(l, dir), "/")
		}
		out = append(out, "lowerdir="+strings.Join(layers, ":"))
	}
	return dir, out
}
