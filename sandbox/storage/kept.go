// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/kata-v2/kata/hypervisor"
)

// keptFiles are files of a disk that are open as long as it is attached, beside the machine's.
type keptFiles struct {
	parts []hypervisor.DiskPart
	err   error
}

func (k *keptFiles) open(s *Source) {
	var c hypervisor.Config
	if c, k.err = (hypervisor.Config{Disks: []hypervisor.Disk{{Parts: s.Parts}}}).Dup(); k.err == nil {
		k.parts = c.Disks[0].Parts
	}
}

func (k *keptFiles) close() {
	hypervisor.Disk{Parts: k.parts}.Close()
	k.parts = nil
}

// Keep is for a machine that may be saved: the disks that it gets from now on keep
// files for Kept, until they are detached or LetGo is called.
func (d *Disks) Keep() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.keep = true
}

// LetGo closes the files that were kept. The machine has ended.
func (d *Disks) LetGo() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, n := range d.all {
		n.kept.close()
	}
}

// Kept is a disk of the machine, or of one that is restored.
type Kept struct {
	// Disk has the place in the guest. Kept's files stay those of the Disks.
	hypervisor.Disk
	// Users are the containers that hold it, in any order.
	Users []string
}

// Kept are the disks that are attached, in the order of their numbers.
func (d *Disks) Kept() ([]Kept, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []Kept
	for _, n := range d.all {
		if n.kept.err != nil {
			return nil, fmt.Errorf("disk %s: %w", n.id, n.kept.err)
		}
		k := Kept{Disk: hypervisor.Disk{ID: n.id, Parts: n.kept.parts, ReadOnly: n.readOnly, Place: n.place}}
		for _, user := range slices.Sorted(maps.Keys(d.held)) {
			if slices.Contains(d.held[user], n) {
				k.Users = append(k.Users, user)
			}
		}
		out = append(out, k)
	}
	slices.SortFunc(out, func(a, b Kept) int { return cmp.Compare(number(a.ID), number(b.ID)) })
	return out, nil
}

const diskName = "disk" // before the number in a disk's ID

// number is that of an ID which newDisk gave.
func number(id string) int {
	n, _ := strconv.Atoi(strings.TrimPrefix(id, diskName))
	return n
}

// Held are the IDs of the disks that a container holds, in the order in which it got them.
func (d *Disks) Held(user string) (ids []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, n := range d.held[user] {
		if !slices.Contains(ids, n.id) { // of the one that booted the machine it is there twice
			ids = append(ids, n.id)
		}
	}
	return ids
}

// Restore is Boot for a machine that goes on with the disks that it had, each
// with its place. No other container's disk is ever found to be one of them.
func (d *Disks) Restore(all []Kept) (out []hypervisor.Disk) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, k := range all {
		n := &disk{key: "restored " + k.ID, id: k.ID, readOnly: k.ReadOnly, ready: make(chan struct{}), users: len(k.Users)}
		d.next = max(d.next, number(k.ID)+1)
		d.add(n, &Source{Parts: k.Parts})
		d.boot = append(d.boot, n)
		for _, user := range k.Users {
			d.held[user] = append(d.held[user], n)
		}
		out = append(out, k.Disk)
	}
	return out
}

// Pass gives all that one user holds to another, who holds nothing.
func (d *Disks) Pass(from, to string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if held := d.held[from]; held != nil {
		d.held[to] = held
		delete(d.held, from)
	}
}
