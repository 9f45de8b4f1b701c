// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/kata-v2/kata/protocols/agentpb"
)

// maxWritten bounds a file that containers write to, in bytes, on either side.
const maxWritten = 1 << 20

// writes are what containers write into a volume's only file. One call waits in the
// guest for the next change. What it answers is the file's content, compared with
// what the host knows, so that both sides end with the same whatever happens at
// once: after a change on the host an answer that was under way means nothing.
//
// Only content comes back, into the file that is there: no owner, no mode, no name.
type writes struct {
	v     *volume
	ctx   context.Context
	guest agentpb.FilesService
	log   *slog.Logger
	told  chan written // has room for one
	wg    sync.WaitGroup

	pushed bool // since the call under way began
}

// written is what the guest has answered.
type written struct {
	resp *agentpb.WrittenResponse
	err  error
}

// digest is how a content is known.
func digest(data []byte) []byte {
	sum := sha256.Sum256(data)
	return sum[:]
}

// request asks for what the host does not know.
func (v *volume) request(wait bool) *agentpb.WrittenRequest {
	return &agentpb.WrittenRequest{Volume: v.name, Path: syncedFileName, Known: v.known, Wait: wait, Most: maxWritten}
}

// checkWritten refuses what cannot be written back.
func (v *volume) checkWritten(st fs.FileInfo) error {
	if !v.file {
		return errors.New("it is no regular file, and only a file can be written to")
	}
	if st.Size() > maxWritten {
		return fmt.Errorf("it has more than %d bytes", maxWritten)
	}
	return unix.Access(v.path(), unix.W_OK)
}

// checkGuest learns, once for a pod, whether the guest tells what is written.
func (s *synced) checkGuest(ctx context.Context, v *volume, guest agentpb.FilesService) error {
	s.mu.Lock()
	takes := s.takes
	s.mu.Unlock()
	if takes {
		return nil
	}
	if _, err := guest.Written(ctx, v.request(false)); err != nil {
		return fmt.Errorf("file %s: %w", v.source, fromGuest(err))
	}
	s.mu.Lock()
	s.takes = true
	s.mu.Unlock()
	return nil
}

// ask begins the call that waits for the next change.
func (w *writes) ask() {
	if !w.v.written {
		return
	}
	w.pushed = false
	req := w.v.request(true)
	w.wg.Go(func() {
		resp, err := w.guest.Written(w.ctx, req)
		w.told <- written{resp, err}
	})
}

// take is what to do about an answer.
func (w *writes) take(t written) {
	switch {
	case w.ctx.Err() != nil:
		return
	case t.err != nil:
		// The guest's connection is lost, or the file: there is nothing to ask any more.
		if err := fromGuest(t.err); !errdefs.IsNotFound(err) {
			w.log.Warn("what is written to a file does not reach the host", "source", w.v.source, "error", err)
		}
		return
	case !w.pushed: // else what was written meanwhile is asked for again
		if err := w.settle(t.resp); err != nil {
			w.log.Warn("what was written to a file is not on the host", "source", w.v.source, "error", err)
		}
	}
	w.ask()
}

// collect takes what is there now.
func (w *writes) collect() error {
	resp, err := w.guest.Written(w.ctx, w.v.request(false))
	if err != nil {
		return fmt.Errorf("file %s: %w", w.v.source, fromGuest(err))
	}
	w.pushed = true // the call under way compares with an older content
	return w.settle(resp)
}

// settle brings what the guest has answered to the host, unless the host's file
// has changed meanwhile: then that is what both have.
func (w *writes) settle(resp *agentpb.WrittenResponse) error {
	if !resp.GetChanged() {
		return nil
	}
	now, err := w.v.scan()
	if err != nil {
		return fmt.Errorf("file %s: %w", w.v.source, err)
	}
	if len(now.since(w.v.sent).Files) > 0 {
		w.pushed = true
		return w.v.push(w.ctx, w.guest)
	}
	return w.v.write(resp)
}

// write writes what the guest has answered into the host's file.
func (v *volume) write(resp *agentpb.WrittenResponse) error {
	if resp.Size > maxWritten || len(resp.Data) > maxWritten {
		v.known = fmt.Append(nil, resp.Size)
		return fmt.Errorf("%d bytes were written, and at most %d are taken: the host's file stays as it was", resp.Size, maxWritten)
	}
	v.known = digest(resp.Data) // also if it cannot be written: asking again would not help
	old := v.sent[syncedFileName]
	if bytes.Equal(old.Data, resp.Data) {
		return nil
	}
	if err := overwrite(v.path(), resp.Data); err != nil {
		return err
	}
	now := proto.Clone(old).(*agentpb.SyncedFile)
	now.Data = resp.Data
	sent := maps.Clone(v.sent)
	sent[syncedFileName] = now
	v.has(sent)
	return nil
}

// overwrite replaces a file's content without ever showing it empty. The file may
// be mounted by itself, so its name is no way.
func overwrite(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, 0)
	return errors.Join(err, f.Truncate(int64(len(data))), f.Close())
}

// collect brings what was written into a container's files to the host.
func (s *synced) collect(ctx context.Context, container string) error {
	s.mu.Lock()
	var volumes []*volume
	for _, v := range s.users[container] {
		if v.written && v.stop != nil {
			volumes = append(volumes, v)
		}
	}
	s.mu.Unlock()
	errs := make([]error, len(volumes))
	var wg sync.WaitGroup
	for i, v := range volumes {
		wg.Go(func() { errs[i] = v.collect(ctx) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// collect has the one that follows the volume do so.
func (v *volume) collect(ctx context.Context) error {
	done := make(chan error, 1)
	select {
	case v.collects <- done:
	case <-v.ended:
		return nil // with the guest
	case <-ctx.Done():
		return fmt.Errorf("file %s: %w", v.source, ctx.Err())
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("file %s: %w", v.source, ctx.Err())
	}
}
