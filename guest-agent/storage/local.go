// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/protocols/typespb"
)

const (
	// optOverlayRW makes an overlay writable, its upper directory in guest memory.
	optOverlayRW = "io.katacontainers.fs-opt.overlay-rw"
	// optLayerPrefix marks options that tell about layers and are not for mount(2).
	optLayerPrefix = "io.katacontainers.fs-opt."
	// optCreateDir is a driver option: a directory to make before mounting.
	optCreateDir = "io.katacontainers.volume.overlayfs.create_directory="
)

func knownDriverOption(o string) bool { return strings.HasPrefix(o, optCreateDir) }

func (m *Manager) overlay(_ context.Context, s *agentpb.Storage, cid string) error {
	for _, o := range s.DriverOptions {
		if dir, ok := strings.CutPrefix(o, optCreateDir); ok {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
		}
	}
	var words []string
	for _, o := range s.Options {
		switch {
		case o == optOverlayRW:
			if cid == "" {
				return fault.New(fault.InvalidArgument, "option %s needs a container", o)
			}
			upper, work := filepath.Join(m.runDir, cid, "upper"), filepath.Join(m.runDir, cid, "work")
			if err := errors.Join(os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755)); err != nil {
				return err
			}
			words = append(words, "upperdir="+upper, "workdir="+work)
		case !strings.HasPrefix(o, optLayerPrefix):
			words = append(words, o)
		}
	}
	source := s.Source
	if source == "" {
		source = "overlay"
	}
	return m.mountAt(source, s.MountPoint, "overlay", words)
}

// ephemeral is memory: a tmpfs, or huge pages that are reserved for it.
func (m *Manager) ephemeral(_ context.Context, s *agentpb.Storage, _ string) error {
	words, gid, err := takeGID(s.Options)
	if err != nil {
		return err
	}
	fstype := s.Fstype
	if fstype == "" {
		fstype = "tmpfs"
	}
	if fstype == "hugetlbfs" {
		if words, err = reserveHugepages(words); err != nil {
			return err
		}
	}
	if err := m.mountAt(orName(s.Source, fstype), s.MountPoint, fstype, words); err != nil {
		return err
	}
	if gid >= 0 {
		return errors.Join(os.Chown(s.MountPoint, -1, gid), os.Chmod(s.MountPoint, 0o2775))
	}
	return nil
}

func orName(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// takeGID splits off the option fsgid=N; -1 when there is none.
func takeGID(words []string) (rest []string, gid int, err error) {
	gid = -1
	for _, w := range words {
		v, ok := strings.CutPrefix(w, "fsgid=")
		if !ok {
			rest = append(rest, w)
			continue
		}
		n, err := strconv.ParseUint(v, 10, 31)
		if err != nil {
			return nil, -1, fault.New(fault.InvalidArgument, "option %q: want a group number", w)
		}
		gid = int(n)
	}
	return rest, gid, nil
}

// reserveHugepages takes as many pages as "pagesize" and "size" ask for.
func reserveHugepages(words []string) ([]string, error) {
	var page, size uint64
	for _, list := range words {
		for _, w := range strings.Split(list, ",") {
			k, v, _ := strings.Cut(w, "=")
			var err error
			switch k {
			case "pagesize":
				page, err = parseBytes(v)
			case "size":
				size, err = parseBytes(v)
			}
			if err != nil {
				return nil, fault.New(fault.InvalidArgument, "option %q: %w", w, err)
			}
		}
	}
	if page == 0 || size == 0 {
		return nil, fault.New(fault.InvalidArgument, "hugetlbfs needs the options pagesize and size, got %q", words)
	}
	// Not tried: the kernel would take what there is from everybody before it gives up.
	if free, err := availableMemory(); err != nil || size > free {
		return nil, errors.Join(fault.New(fault.FailedPrecondition, "the guest has %d MiB of memory available for %d MiB of huge pages: give the pod more memory", free>>20, size>>20), err)
	}
	file := fmt.Sprintf("/sys/kernel/mm/hugepages/hugepages-%dkB/nr_hugepages", page>>10)
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fault.New(fault.FailedPrecondition, "the guest kernel has no huge pages of %d kB: %w", page>>10, err)
	}
	have, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return nil, err
	}
	want := have + size/page
	if err := os.WriteFile(file, []byte(strconv.FormatUint(want, 10)), 0); err != nil {
		return nil, err
	}
	// The kernel takes the number and reserves what it finds.
	if b, err = os.ReadFile(file); err != nil {
		return nil, err
	}
	if got, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64); err != nil || got < want {
		return nil, errors.Join(fault.New(fault.FailedPrecondition, "the guest's memory has room for %s of %d huge pages of %d kB: give the pod more memory",
			strings.TrimSpace(string(b)), want, page>>10), os.WriteFile(file, fmt.Append(nil, have), 0))
	}
	return words, nil
}

// availableMemory is what can be had without swapping (proc(5), MemAvailable), in bytes.
func availableMemory() (uint64, error) {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "MemAvailable:" {
			kb, err := strconv.ParseUint(f[1], 10, 54)
			return kb << 10, err
		}
	}
	return 0, errors.New("/proc/meminfo has no MemAvailable")
}

func parseBytes(s string) (uint64, error) {
	shift := 0
	if n := len(s); n > 0 {
		switch s[n-1] {
		case 'k', 'K':
			shift = 10
		case 'm', 'M':
			shift = 20
		case 'g', 'G':
			shift = 30
		}
		if shift > 0 {
			s = s[:n-1]
		}
	}
	n, err := strconv.ParseUint(s, 10, 64-shift)
	return n << shift, err
}

// local is a directory of the guest's own.
func (m *Manager) local(_ context.Context, s *agentpb.Storage, _ string) error {
	words, gid, err := takeGID(s.Options)
	if err != nil {
		return err
	}
	mode := os.FileMode(0o755)
	for _, w := range words {
		if v, ok := strings.CutPrefix(w, "mode="); ok {
			n, err := strconv.ParseUint(v, 8, 12)
			if err != nil {
				return fault.New(fault.InvalidArgument, "option %q: want an octal mode", w)
			}
			mode = os.FileMode(n)
		}
	}
	if err := os.MkdirAll(s.MountPoint, 0o755); err != nil {
		return err
	}
	if gid >= 0 {
		mode |= 0o070 | unix.S_ISGID
		if err := os.Chown(s.MountPoint, -1, gid); err != nil {
			return err
		}
	}
	// The plain number, not os.FileMode: the mode may have set-gid and sticky bits.
	return unix.Chmod(s.MountPoint, uint32(mode))
}

// applyFSGroup gives the volume's files to a group: owner, group rw (x on
// directories), set-gid on directories.
func applyFSGroup(mp string, g *agentpb.FSGroup) error {
	if g == nil {
		return nil
	}
	gid := g.GroupId
	if g.GroupChangePolicy == typespb.FSGroupChangePolicy_OnRootMismatch {
		st, err := os.Stat(mp)
		if err != nil {
			return err
		}
		sys, ok := st.Sys().(*syscall.Stat_t)
		if ok && sys.Gid == gid && st.Mode()&os.ModeSetgid != 0 && st.Mode().Perm()&0o070 == 0o070 {
			return nil
		}
	}
	return filepath.WalkDir(mp, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := os.Lchown(path, -1, int(gid)); err != nil {
			return err
		}
		if d.Type()&fs.ModeSymlink != 0 {
			return nil
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		mode := st.Mode() | 0o060
		if d.IsDir() {
			mode |= 0o010 | os.ModeSetgid
		}
		return os.Chmod(path, mode)
	})
}
