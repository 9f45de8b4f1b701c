// SPDX-License-Identifier: Apache-2.0

// Package cpio writes the archive format that the kernel unpacks as its first
// root: "newc", described in the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst.
package cpio

import (
	"errors"
	"fmt"
	"io"
	"path"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// Entry is one file of an archive.
type Entry struct {
	// Name is the path, relative to the root, without a leading slash.
	Name string
	// Mode holds type and permission bits as in stat(2): unix.S_IFREG|0o755.
	Mode uint32
	// Data is a regular file's content or a symbolic link's target.
	Data []byte
	// Major and Minor number a device node.
	Major, Minor uint32
}

// Dir is a directory entry with the given permissions.
func Dir(name string, perm uint32) Entry { return Entry{Name: name, Mode: unix.S_IFDIR | perm} }

// File is a regular file.
func File(name string, perm uint32, data []byte) Entry {
	return Entry{Name: name, Mode: unix.S_IFREG | perm, Data: data}
}

// Symlink is a symbolic link to target.
func Symlink(name, target string) Entry {
	return Entry{Name: name, Mode: unix.S_IFLNK | 0o777, Data: []byte(target)}
}

// CharDevice is a character device node.
func CharDevice(name string, perm, major, minor uint32) Entry {
	return Entry{Name: name, Mode: unix.S_IFCHR | perm, Major: major, Minor: minor}
}

const (
	magic      = "070701"
	headerSize = len(magic) + 13*8
	trailer    = "TRAILER!!!"
)

// Write writes the entries as one archive: sorted by name, missing parent
// directories added with mode 0755, owner root, all times zero. So equal entries
// give equal bytes. A name given twice, absolute, or leading out is an error.
func Write(w io.Writer, entries []Entry) error {
	all, err := complete(entries)
	if err != nil {
		return err
	}
	for i, e := range all {
		if err := writeEntry(w, uint32(i+1), e); err != nil {
			return fmt.Errorf("cpio: %s: %w", e.Name, err)
		}
	}
	if err := writeEntry(w, 0, Entry{Name: trailer}); err != nil {
		return fmt.Errorf("cpio: trailer: %w", err)
	}
	return nil
}

// complete checks names, adds parents and sorts; a parent sorts before its children.
func complete(entries []Entry) ([]Entry, error) {
	byName := make(map[string]Entry, len(entries))
	for _, e := range entries {
		if e.Name == "" || e.Name != path.Clean(e.Name) || path.IsAbs(e.Name) || e.Name == "." || strings.HasPrefix(e.Name, "..") {
			return nil, fmt.Errorf("cpio: name %q: want a clean relative path", e.Name)
		}
		if _, twice := byName[e.Name]; twice {
			return nil, fmt.Errorf("cpio: name %q is given twice", e.Name)
		}
		byName[e.Name] = e
	}
	for _, e := range entries {
		for dir := path.Dir(e.Name); dir != "."; dir = path.Dir(dir) {
			parent, ok := byName[dir]
			if !ok {
				byName[dir] = Dir(dir, 0o755)
			} else if parent.Mode&unix.S_IFMT != unix.S_IFDIR {
				return nil, fmt.Errorf("cpio: %s lies below %s, which is not a directory", e.Name, dir)
			}
		}
	}
	all := make([]Entry, 0, len(byName))
	for _, e := range byName {
		all = append(all, e)
	}
	sort.Slice(all, func(i, j int) bool { return all[i].Name < all[j].Name })
	return all, nil
}

// writeEntry writes header, name and data, the latter two padded to 4 bytes.
func writeEntry(w io.Writer, inode uint32, e Entry) error {
	if uint64(len(e.Data)) > 1<<32-1 {
		return errors.New("content of 4 GiB and more does not fit the format")
	}
	links := 1
	if e.Mode&unix.S_IFMT == unix.S_IFDIR {
		links = 2
	}
	var b strings.Builder
	b.WriteString(magic)
	// inode, mode, uid, gid, nlink, mtime, size, device major/minor, node major/minor, name size, checksum
	for _, v := range []uint32{inode, e.Mode, 0, 0, uint32(links), 0, uint32(len(e.Data)), 0, 0, e.Major, e.Minor, uint32(len(e.Name) + 1), 0} {
		fmt.Fprintf(&b, "%08X", v)
	}
	b.WriteString(e.Name)
	b.WriteByte(0)
	b.WriteString(padding(headerSize + len(e.Name) + 1))
	if _, err := io.WriteString(w, b.String()); err != nil {
		return err
	}
	if _, err := w.Write(e.Data); err != nil {
		return err
	}
	_, err := io.WriteString(w, padding(len(e.Data)))
	return err
}

func padding(n int) string { return "\x00\x00\x00"[:(4-n%4)%4] }
