// SPDX-License-Identifier: Apache-2.0

package agenttest

import (
	"context"
	"maps"
	"path"
	"strings"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/protocols/agentpb"
)

// Sync implements the service kata.Files.
func (a *Agent) Sync(_ context.Context, r *agentpb.SyncFilesRequest) (*emptypb.Empty, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, f := range r.Files {
		a.files[path.Join(r.Volume, f.Path)] = string(f.Data)
	}
	for _, gone := range r.Removals {
		gone = path.Join(r.Volume, gone)
		maps.DeleteFunc(a.files, func(name, _ string) bool { return name == gone || strings.HasPrefix(name, gone+"/") })
	}
	close(a.synced)
	a.synced = make(chan struct{})
	return empty, nil
}

// Files are what the guest has of synced volumes, by volume and path, with the
// content of files and the target of links, and a channel that the next change closes.
func (a *Agent) Files() (map[string]string, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.Clone(a.files), a.synced
}
