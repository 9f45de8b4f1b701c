// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// copies is a guest that holds synced volumes.
type copies struct {
	mu      sync.Mutex
	files   map[string]*agentpb.SyncedFile // guarded by mu; by volume/path
	log     []string                       // guarded by mu; paths in the order of their change, "-" for a removal
	changed chan struct{}                  // guarded by mu; closed and replaced by each Sync
	err     error                          // guarded by mu; what Sync answers
	old     bool                           // guarded by mu; without Written
}

func newCopies() *copies {
	return &copies{files: map[string]*agentpb.SyncedFile{}, changed: make(chan struct{})}
}

// Sync implements agentpb.FilesService.
func (g *copies) Sync(_ context.Context, r *agentpb.SyncFilesRequest) (*emptypb.Empty, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err != nil {
		return nil, g.err
	}
	for _, f := range r.Files {
		g.files[path.Join(r.Volume, f.Path)] = f
		g.log = append(g.log, f.Path)
	}
	for _, p := range r.Removals {
		g.log = append(g.log, "-"+p)
		gone := path.Join(r.Volume, p)
		maps.DeleteFunc(g.files, func(name string, _ *agentpb.SyncedFile) bool {
			return name == gone || strings.HasPrefix(name, gone+"/")
		})
	}
	close(g.changed)
	g.changed = make(chan struct{})
	return &emptypb.Empty{}, nil
}

// Forget implements agentpb.FilesService.
func (g *copies) Forget(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// Written implements agentpb.FilesService.
func (g *copies) Written(ctx context.Context, r *agentpb.WrittenRequest) (*agentpb.WrittenResponse, error) {
	for {
		g.mu.Lock()
		f, changed, old := g.files[path.Join(r.Volume, r.Path)], g.changed, g.old
		g.mu.Unlock()
		switch {
		case old:
			return nil, status.Error(codes.Unimplemented, "an older guest")
		case f == nil:
			return nil, status.Error(codes.NotFound, "no such file")
		case len(f.Data) > int(r.Most) && string(r.Known) != fmt.Sprint(len(f.Data)):
			return &agentpb.WrittenResponse{Changed: true, Size: uint64(len(f.Data))}, nil
		case len(f.Data) <= int(r.Most) && !bytes.Equal(digest(f.Data), r.Known):
			return &agentpb.WrittenResponse{Changed: true, Data: f.Data, Size: uint64(len(f.Data))}, nil
		case !r.Wait:
			return &agentpb.WrittenResponse{}, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// write is a container's write into a file, by its path in the guest.
func (g *copies) write(guest, data string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	name := strings.TrimPrefix(guest, protocols.GuestSyncedDir+"/")
	f := proto.Clone(g.files[name]).(*agentpb.SyncedFile)
	f.Data = []byte(data)
	g.files[name] = f
	close(g.changed)
	g.changed = make(chan struct{})
}

// data is a file's content or a link's target, by its path in the guest.
func (g *copies) data(guest string) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	f := g.files[strings.TrimPrefix(guest, protocols.GuestSyncedDir+"/")]
	if f == nil {
		return "(none)"
	}
	return string(f.Data)
}

// all is what the guest has, and log the order of the changes.
func (g *copies) all() (files map[string]*agentpb.SyncedFile, log []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return maps.Clone(g.files), slices.Clone(g.log)
}

// until waits for a state of the guest.
func (g *copies) until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	limit := time.After(20 * time.Second)
	for {
		g.mu.Lock()
		changed := g.changed
		g.mu.Unlock()
		if ok() {
			return
		}
		select {
		case <-changed:
		case <-limit:
			files, _ := g.all()
			t.Fatalf("%s does not come; the guest has %q", what, slices.Sorted(maps.Keys(files)))
		}
	}
}

// kubelet writes a volume as Kubernetes does: a new directory, the link to it
// replaced, the names, the old directory removed.
func kubelet(t *testing.T, dir, version string, files map[string]string) {
	t.Helper()
	must(t, os.MkdirAll(dir, 0o755))
	old, _ := os.Readlink(dir + "/..data")
	for name, data := range files {
		write(t, dir+"/.."+version+"/"+name, data)
	}
	must(t, os.Symlink(".."+version, dir+"/..data_tmp"))
	must(t, os.Rename(dir+"/..data_tmp", dir+"/..data"))
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		if files[e.Name()] == "" && !strings.HasPrefix(e.Name(), "..") {
			must(t, os.Remove(dir+"/"+e.Name()))
		}
	}
	for name := range files {
		top, _, _ := strings.Cut(name, "/")
		if err := os.Symlink("..data/"+top, dir+"/"+top); err != nil && !errors.Is(err, os.ErrExist) {
			t.Fatal(err)
		}
	}
	if old != "" {
		must(t, os.RemoveAll(dir+"/"+old))
	}
}

func push(t *testing.T, s *Share, container string, g *copies) {
	t.Helper()
	must(t, s.Push(context.Background(), container, g))
}

func TestSyncedVolume(t *testing.T) {
	s, g := newShare(t), newCopies()
	dir := t.TempDir() + "/volume"
	kubelet(t, dir, "1", map[string]string{"key": "one", "gone": "soon", "sub/deep": "x"})
	must(t, os.Chown(dir+"/..1/key", 7, 8))
	must(t, os.Chmod(dir+"/..1/key", 0o440))
	guest, err := s.Sync("c1", dir, false, nil)
	must(t, err)
	push(t, s, "c1", g)
	if got := g.data(guest + "/..1/key"); got != "one" || g.data(guest+"/..data") != "..1" || g.data(guest+"/key") != "..data/key" || g.data(guest+"/..1/sub/deep") != "x" {
		t.Errorf("the guest has %q at %q", got, guest)
	}
	files, _ := g.all()
	if f := files[strings.TrimPrefix(guest, protocols.GuestSyncedDir+"/")+"/..1/key"]; f.Uid != 7 || f.Gid != 8 || f.Mode != unix.S_IFREG|0o440 {
		t.Errorf("%v", f)
	}
	again, err := s.Sync("c2", dir, false, nil)
	must(t, err)
	if again != guest {
		t.Errorf("a second container's copy is at %s, the first one's at %s", again, guest)
	}
	push(t, s, "c2", g)
	g.mu.Lock()
	g.log = nil
	g.mu.Unlock()

	began := time.Now()
	kubelet(t, dir, "2", map[string]string{"key": "two", "new": "x"})
	g.until(t, "the update", func() bool {
		return g.data(guest+"/..data") == "..2" && g.data(guest+"/new") == "..data/new" && g.data(guest+"/gone") == "(none)" && g.data(guest+"/..1") == "(none)"
	})
	t.Logf("updated after %v", time.Since(began))
	_, log := g.all()
	at := func(p string) int { return slices.Index(log, p) }
	if at("..2/key") < 0 || at("..2/key") > at("..data") || at("..data") > at("-..1") || slices.Contains(log, "..1") {
		t.Errorf("order of the changes: %q", log)
	}

	must(t, s.Remove("c1"))
	kubelet(t, dir, "3", map[string]string{"key": "three"})
	g.until(t, "the update for the other container", func() bool { return g.data(guest+"/..3/key") == "three" })
	must(t, s.Remove("c2"))
	g.until(t, "the removal", func() bool { return g.data(guest) == "(none)" })
	if files, _ := g.all(); len(files) > 0 {
		t.Errorf("left in the guest: %v", files)
	}
}

// A file that is mounted by itself is changed in place.
func TestSyncedFile(t *testing.T) {
	s, g := newShare(t), newCopies()
	file := write(t, t.TempDir()+"/resolv.conf", "one")
	guest, err := s.Sync("c1", file, false, nil)
	must(t, err)
	push(t, s, "c1", g)
	if got := g.data(guest); got != "one" {
		t.Errorf("%q", got)
	}
	files, _ := g.all()
	for _, f := range files {
		if !f.InPlace {
			t.Errorf("%v is not in place", f)
		}
	}
	write(t, file, "two")
	g.until(t, "the update", func() bool { return g.data(guest) == "two" })
}

// The volume of one container may be on a mount that only the host has.
func TestSyncedOnTheHost(t *testing.T) {
	h := newHost(t)
	s, g := h.share(), newCopies()
	dir := t.TempDir() + "/secret"
	h.tmpfs(dir, "..1")
	h.do(func() error {
		return errors.Join(os.Remove(dir+"/..1"), os.Mkdir(dir+"/..1", 0o755), os.WriteFile(dir+"/..1/key", []byte("one"), 0o400), os.Symlink("..1", dir+"/..data"))
	})
	guest, err := s.Sync("c1", dir, false, nil)
	must(t, err)
	push(t, s, "c1", g)
	h.do(func() error {
		return errors.Join(os.Mkdir(dir+"/..2", 0o755), os.WriteFile(dir+"/..2/key", []byte("two"), 0o400),
			os.Symlink("..2", dir+"/..x"), os.Rename(dir+"/..x", dir+"/..data"))
	})
	g.until(t, "the update", func() bool { return g.data(guest+"/..2/key") == "two" })
}

// What does not fit is for the share; no link leads out of a volume.
func TestNotSynced(t *testing.T) {
	s := newShare(t)
	base := t.TempDir()
	make := func(name string, f func(dir string)) string {
		dir := base + "/" + name
		kubelet(t, dir, "1", map[string]string{"key": "x"})
		f(dir)
		return dir
	}
	for name, dir := range map[string]string{
		"plain":   make("plain", func(dir string) { must(t, os.Remove(dir+"/..data")) }),
		"large":   make("large", func(dir string) { must(t, os.Truncate(dir+"/..1/key", maxSyncedBytes+1)) }),
		"fifo":    make("fifo", func(dir string) { must(t, unix.Mkfifo(dir+"/..1/fifo", 0o600)) }),
		"outside": make("outside", func(dir string) { must(t, os.Remove(dir+"/..data")); must(t, os.Symlink("/etc", dir+"/..data")) }),
		"up":      make("up", func(dir string) { must(t, os.Remove(dir+"/..data")); must(t, os.Symlink("../up", dir+"/..data")) }),
		"file":    write(t, base+"/file", strings.Repeat("x", maxSyncedBytes+1)),
	} {
		if guest, err := s.Sync("c1", dir, false, nil); !errors.Is(err, ErrNotSynced) {
			t.Errorf("%s: %q, %v", name, guest, err)
		}
	}
	if _, err := s.Sync("c1", base+"/missing", false, nil); !errors.Is(err, os.ErrNotExist) || errors.Is(err, ErrNotSynced) {
		t.Errorf("a volume that is not there: %v", err)
	}
	// A link in the volume is copied as a link, whatever it names.
	g := newCopies()
	guest, err := s.Sync("c1", make("link", func(dir string) { must(t, os.Symlink("/etc/shadow", dir+"/..1/link")) }), false, nil)
	must(t, err)
	push(t, s, "c1", g)
	if got := g.data(guest + "/..1/link"); got != "/etc/shadow" {
		t.Errorf("the link's copy: %q", got)
	}
	// A pod's volumes together are bounded too.
	var last error
	for i := 0; i <= maxSyncedPod/maxSyncedBytes && last == nil; i++ {
		_, last = s.Sync("c2", write(t, fmt.Sprintf("%s/big%d", base, i), strings.Repeat("x", maxSyncedBytes-100)), false, nil)
	}
	if !errors.Is(last, ErrNotSynced) {
		t.Errorf("a pod with too much: %v", last)
	}
	must(t, s.Remove("c2"))
	if _, err := s.Sync("c3", base+"/big0", false, nil); err != nil {
		t.Errorf("after the removal of the others: %v", err)
	}
}

// A guest that fails, and one that fails later, leave nothing behind on the host.
func TestPushFails(t *testing.T) {
	s, g := newShare(t), newCopies()
	dir := t.TempDir() + "/volume"
	kubelet(t, dir, "1", map[string]string{"key": "one"})
	_, err := s.Sync("c1", dir, false, nil)
	must(t, err)
	g.err = errors.New("no")
	if err := s.Push(context.Background(), "c1", g); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("%v; want an error that names the volume", err)
	}
	s.Unsync("c1")
	if n := len(s.synced.volumes); n != 0 || s.synced.bytes != 0 {
		t.Errorf("%d volumes of %d bytes are left", n, s.synced.bytes)
	}
	g.err = nil
	guest, err := s.Sync("c1", dir, false, nil)
	must(t, err)
	push(t, s, "c1", g)
	if got := g.data(guest + "/..1/key"); got != "one" {
		t.Errorf("another try: %q", got)
	}
}

// Containers that come and go at once share a volume, and its end is one.
func TestSyncedAtOnce(t *testing.T) {
	s, err := NewShare(t.TempDir()+"/shared", nil, slog.Default())
	must(t, err)
	g := newCopies()
	dir := t.TempDir() + "/volume"
	kubelet(t, dir, "1", map[string]string{"key": "one"})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			id := fmt.Sprint("c", i)
			for range 5 {
				guest, err := s.Sync(id, dir, false, nil)
				if err == nil {
					err = s.Push(context.Background(), id, g)
				}
				if got := g.data(guest + "/..1/key"); err != nil || got != "one" {
					t.Errorf("%q, %v", got, err)
				}
				s.Unsync(id)
			}
		})
	}
	wg.Wait()
	must(t, s.Close())
}

// A connection that was lost is still known for that; an answer has its kind.
func TestErrorsOfTheGuest(t *testing.T) {
	if err := fromGuest(fmt.Errorf("sync: %w", ttrpc.ErrClosed)); !errors.Is(err, ttrpc.ErrClosed) {
		t.Errorf("a lost connection: %v", err)
	}
	if err := fromGuest(status.Error(codes.Unimplemented, "no such service")); !errdefs.IsNotImplemented(err) {
		t.Errorf("a guest without the service: %v", err)
	}
}
