// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/kata-v2/kata/sandbox/checkpoint"
	"github.com/kata-v2/kata/sandbox/storage"
)

// manifest says what the checkpoint of a pod is, but for what is only known when
// it stands still. Containers that were saved before and not taken over since are
// in it as they were.
func (s *Sandbox) manifest(ctx context.Context, m *machine, p *parked, w *checkpoint.Writer) (*checkpoint.Manifest, error) {
	share, err := s.share()
	if err != nil {
		return nil, err
	}
	out := &checkpoint.Manifest{Sandbox: s.o.ID, Machine: m.saves.key, Ports: m.saves.ports, Synced: share.SyncedNumber(), Containers: p.waiting}
	for _, c := range p.containers {
		saved, err := c.manifest(share)
		if err != nil {
			return nil, fmt.Errorf("checkpoint: container %s: %w", c.id, err)
		}
		out.Containers = append(out.Containers, saved)
	}
	for _, d := range p.disks {
		saved, err := describeDisk(d, w)
		if err != nil {
			return nil, fmt.Errorf("checkpoint: disk %s: %w", d.ID, err)
		}
		out.Disks = append(out.Disks, saved)
	}
	interfaces, routes, err := m.net.Guest(ctx)
	if err != nil {
		return nil, fmt.Errorf("checkpoint: network: %w", err)
	}
	if out.Interfaces, err = wireJSON(interfaces); err == nil {
		out.Routes, err = wireJSON(routes)
	}
	if err != nil {
		return nil, fmt.Errorf("checkpoint: network: %w", err)
	}
	return out, nil
}

// manifest is the container's part of it.
func (c *Container) manifest(share *storage.Share) (checkpoint.Container, error) {
	wants := c.init.wants
	if c.restored != nil { // the guest has what it had at first
		saved := c.restored.saved
		wants.Stdin, wants.Stdout, wants.Stderr = saved.Stdin, saved.Stdout, saved.Stderr
	}
	out := checkpoint.Container{
		Name: c.name(), ID: c.guest, Bundle: c.bundle, State: c.init.State().String(), PID: c.init.GuestPID(),
		Terminal: c.init.Terminal(), Stdin: wants.Stdin, Stdout: wants.Stdout, Stderr: wants.Stderr,
		Disks: c.s.disks.Held(c.id), Volumes: map[string]storage.SyncedCopy{},
	}
	copies := share.Copies(c.id)
	for _, i := range c.synced {
		out.Volumes[c.spec.Mounts[i].Destination] = copies[c.sources[i]]
	}
	var err error
	out.Spec, err = json.Marshal(c.spec)
	return out, err
}

// name is that by which it is found in a checkpoint.
func (c *Container) name() string { return savedName(c.id, c.spec.Annotations) }

// describeDisk is a disk without the content of one that is written. Pieces of
// others that are no files of the host are kept.
func describeDisk(d storage.Kept, w *checkpoint.Writer) (checkpoint.Disk, error) {
	out := checkpoint.Disk{ID: d.ID, Place: d.Place, ReadOnly: d.ReadOnly}
	if !d.ReadOnly {
		return out, nil
	}
	for i, p := range d.Parts {
		saved := checkpoint.Part{Sectors: p.Sectors}
		var err error
		if filepath.IsAbs(p.File.Name()) {
			saved.Path = p.File.Name()
			saved.File, err = digestOfPart(p)
		} else {
			saved.File, err = keepPart(d.ID, i, p, w)
		}
		if err != nil {
			return out, fmt.Errorf("part %d: %w", i, err)
		}
		out.Parts = append(out.Parts, saved)
	}
	return out, nil
}

// duplicate is a name that two containers have, empty if there is none.
func duplicate(names []string) string {
	slices.Sort(names)
	for i := range names[min(1, len(names)):] {
		if names[i] == names[i+1] {
			return names[i]
		}
	}
	return ""
}

func wireJSON[M proto.Message](all []M) (out []json.RawMessage, err error) {
	for _, m := range all {
		b, err := protojson.Marshal(m)
		if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}

// sameWire tells whether messages are those that were written.
func sameWire[M proto.Message](saved []json.RawMessage, now []M) bool {
	if len(saved) != len(now) {
		return false
	}
	for i, m := range now {
		was := m.ProtoReflect().New().Interface()
		if protojson.Unmarshal(saved[i], was) != nil || !proto.Equal(was, m) {
			return false
		}
	}
	return true
}
