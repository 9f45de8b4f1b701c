// SPDX-License-Identifier: Apache-2.0

package agenttest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"maps"
	"path"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
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

// Written implements agentpb.FilesService.
func (a *Agent) Written(ctx context.Context, r *agentpb.WrittenRequest) (*agentpb.WrittenResponse, error) {
	for {
		a.mu.Lock()
		data, ok := a.files[path.Join(r.Volume, r.Path)]
		changed := a.synced
		a.mu.Unlock()
		if !ok {
			return nil, status.Error(codes.NotFound, "no such file")
		}
		if sum := sha256.Sum256([]byte(data)); !bytes.Equal(sum[:], r.Known) {
			return &agentpb.WrittenResponse{Changed: true, Data: []byte(data), Size: uint64(len(data))}, nil
		}
		if !r.Wait {
			return &agentpb.WrittenResponse{}, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Write is a container's write into the file of a synced volume, by volume and path.
func (a *Agent) Write(name, data string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.files[name] = data
	close(a.synced)
	a.synced = make(chan struct{})
}

// Forget implements agentpb.FilesService.
func (a *Agent) Forget(context.Context, *emptypb.Empty) (*emptypb.Empty, error) { return empty, nil }
