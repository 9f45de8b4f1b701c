// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"

	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// SyncedCopy is the guest's copy of a synced volume, as a saved machine has it.
type SyncedCopy struct {
	// Name is that of the copy in the guest.
	Name string `json:"name"`
	// Path is what containers mount of it: a directory, or its only file.
	Path string `json:"path"`
	// Files are the paths below it, sorted.
	Files []string `json:"files"`
}

// Copies are the copies that a container's volumes have in the guest, by Path.
func (s *Share) Copies(container string) map[string]SyncedCopy {
	s.synced.mu.Lock()
	defer s.synced.mu.Unlock()
	out := map[string]SyncedCopy{}
	for _, v := range s.synced.users[container] {
		c := SyncedCopy{Name: v.name, Path: v.inGuest()}
		if names := v.names.Load(); names != nil {
			c.Files = *names
		}
		out[c.Path] = c
	}
	return out
}

// SyncedNumber is the highest number of a copy's name so far, and ContinueSynced
// has a restored pod count from there.
func (s *Share) SyncedNumber() int {
	s.synced.mu.Lock()
	defer s.synced.mu.Unlock()
	return s.synced.next
}

// ContinueSynced: see SyncedNumber.
func (s *Share) ContinueSynced(number int) {
	s.synced.mu.Lock()
	defer s.synced.mu.Unlock()
	s.synced.next = max(s.synced.next, number)
}

// inGuest is what containers mount.
func (v *volume) inGuest() string {
	dir := filepath.Join(protocols.GuestSyncedDir, v.name)
	if v.file {
		return filepath.Join(dir, syncedFileName)
	}
	return dir
}

// has notes what the guest has.
func (v *volume) has(s snapshot) {
	v.sent = s
	names := slices.Sorted(maps.Keys(s))
	v.names.Store(&names)
}

// resume is the first push to a guest that has a copy already, which becomes like
// the host's. Of a file that containers write to and that is empty on the host, as
// that for a container's last words is, the content is the guest's: the host has it
// as soon as it is asked for.
func (v *volume) resume(ctx context.Context, guest agentpb.FilesService) error {
	now, err := v.scan()
	if err != nil {
		return fmt.Errorf("volume %s: %w", v.source, err)
	}
	if v.written && len(now[syncedFileName].Data) == 0 {
		v.has(now)
		v.known = digest(nil)
		return nil
	}
	v.sent = snapshot{}
	for _, path := range v.restored.Files {
		v.sent[path] = &agentpb.SyncedFile{Path: path} // unlike any that there is
	}
	return v.push(ctx, guest)
}
