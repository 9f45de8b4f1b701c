// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/sandbox/checkpoint"
	"github.com/kata-v2/kata/sandbox/storage"
)

// restoreDisks is bootDisks for a machine that is restored. Those of the container
// that starts it are its own files; the others, whose containers come later if at
// all, are what the checkpoint names and keeps.
func (s *Sandbox) restoreDisks(vc *hypervisor.Config, f first) error {
	var all []storage.Kept
	undo := func() {
		for _, k := range all {
			k.Close()
		}
	}
	for _, was := range f.restore.c.Disks {
		k := storage.Kept{Users: f.restore.users(was.ID)}
		src, err := f.sourceOf(was)
		if src != nil {
			k.Disk = hypervisor.Disk{ID: was.ID, Parts: src.Parts, ReadOnly: was.ReadOnly, Place: was.Place}
		} else if err == nil {
			k.Disk, err = f.restore.c.OpenDisk(was)
		}
		if err == nil {
			err = f.restore.note(k.Disk)
		}
		if err != nil {
			undo()
			return err
		}
		all = append(all, k)
	}
	vc.Disks = s.disks.Restore(all)
	vc.HotplugPorts = max(f.restore.c.Ports-len(vc.Disks), 0)
	return nil
}

// sourceOf is the file of the first container that is to be a saved disk, with the
// content that was saved; nil for a disk of other containers.
func (f first) sourceOf(was checkpoint.Disk) (*storage.Source, error) {
	if f.takeover == nil {
		return nil, nil
	}
	i := slices.Index(f.takeover.saved.Disks, was.ID)
	if i < 0 {
		return nil, nil
	}
	if was.ReadOnly {
		return f.disks[i], nil
	}
	return f.disks[i], f.restore.c.LoadDisk(was, f.disks[i].Parts[0].File)
}

// users are those that hold a disk of the machine at first.
func (r *restore) users(disk string) (out []string) {
	for _, c := range r.c.Containers {
		if slices.Contains(c.Disks, disk) {
			out = append(out, savedUser(c.ID))
		}
	}
	return out
}

// note remembers which files a read-only disk consists of.
func (r *restore) note(d hypervisor.Disk) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range d.Parts {
		st, err := p.File.Stat()
		if err != nil {
			return err
		}
		r.parts[d.ID] = append(r.parts[d.ID], st)
	}
	return nil
}

// fits refuses disks of a container that are not like those of the saved one: what
// is read must be the same, what is written is not looked at.
func (t *takeover) fits(sources []*storage.Source) error {
	if len(sources) != len(t.saved.Disks) {
		return fmt.Errorf("checkpoint: container %s had %d disks and has %d: %w", t.saved.Name, len(t.saved.Disks), len(sources), errdefs.ErrInvalidArgument)
	}
	for i, src := range sources {
		k := slices.IndexFunc(t.c.Disks, func(d checkpoint.Disk) bool { return d.ID == t.saved.Disks[i] })
		if k < 0 {
			return fmt.Errorf("checkpoint: container %s: its disk %s is not in the manifest: %w", t.saved.Name, t.saved.Disks[i], errdefs.ErrInvalidArgument)
		}
		was := t.c.Disks[k]
		if was.ReadOnly != src.ReadOnly {
			return fmt.Errorf("checkpoint: disk %s: read-only was %t and is %t: %w", was.ID, was.ReadOnly, src.ReadOnly, errdefs.ErrInvalidArgument)
		}
		if !src.ReadOnly {
			continue
		}
		if err := t.sameParts(was, src.Parts); err != nil {
			return err
		}
	}
	return nil
}

func (t *takeover) sameParts(was checkpoint.Disk, parts []hypervisor.DiskPart) error {
	if len(parts) != len(was.Parts) {
		return fmt.Errorf("checkpoint: disk %s had %d parts and has %d, which is not what the pod had: it needs the same image: %w", was.ID, len(was.Parts), len(parts), errdefs.ErrInvalidArgument)
	}
	t.mu.Lock()
	known := slices.Clone(t.parts[was.ID])
	t.mu.Unlock()
	for i, p := range parts {
		if st, err := p.File.Stat(); err == nil && i < len(known) && os.SameFile(st, known[i]) {
			continue // which was compared when the machine was restored
		}
		now, err := digestOfPart(p)
		if err != nil {
			return fmt.Errorf("checkpoint: disk %s: part %d: %w", was.ID, i, err)
		}
		if now != was.Parts[i].File {
			return fmt.Errorf("checkpoint: disk %s: part %d (%s) is not what the pod had: it needs the same image: %w", was.ID, i, p.File.Name(), errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// digestOfPart leaves the place in the file as it is: QEMU shares it.
func digestOfPart(p hypervisor.DiskPart) (checkpoint.File, error) {
	f, err := reopen(p.File)
	if err != nil {
		return checkpoint.File{}, err
	}
	defer f.Close()
	out, err := checkpoint.DigestOf(f)
	if err != nil {
		err = fmt.Errorf("%s: %w", filepath.Base(p.File.Name()), err)
	}
	return out, err
}
