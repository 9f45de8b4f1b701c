// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/status"

	"github.com/kata-v2/kata/protocols/agentpb"
)

// Bounds of what is copied into the guest's memory. What is beyond them, when a
// container is created, goes through the share. A volume is one message to the
// guest, and ttrpc takes 4 MiB.
const (
	maxSyncedBytes = 3 << 20  // of one volume
	maxSyncedFiles = 4096     // of one volume
	maxSyncedPod   = 32 << 20 // of all volumes of a pod
)

// ErrNotSynced says that a volume is not one that can be copied into the guest
// and kept up to date there; it goes through the share.
var ErrNotSynced = errors.New("the volume is shared, not synced")

// synced are the small read-only volumes of a pod that the guest has copies of,
// in its memory. The host's are watched, and what changes is copied at once. The
// guest applies the host's renames as renames, so a workload sees the update as it
// would on the host: at once, by the same inotify events.
//
// A single file may be one that containers write to: what they write is copied back
// (see written.go).
//
// One that several containers mount exists once.
type synced struct {
	host  *hostMounts
	log   *slog.Logger
	watch func() (*watcher, error) // makes it for the first volume

	ctx    context.Context // ends with the pod
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	next    int                   // guarded by mu; number of the next volume
	bytes   int                   // guarded by mu; of all volumes
	volumes map[volumeKey]*volume // guarded by mu
	users   map[string][]*volume  // guarded by mu; by container
	closed  bool                  // guarded by mu; no more goroutines
	takes   bool                  // guarded by mu; the guest tells what is written
}

// volumeKey tells volumes apart: one that containers write to is none that they read.
type volumeKey struct {
	source  string
	written bool
	name    string // of the copy that a restored guest has; empty for a new one
}

// volume is one source on the host and its copy in the guest.
type volume struct {
	volumeKey
	name    string // of the copy, in protocols.GuestSyncedDir
	open    func() error
	changed chan struct{} // has room for one; what the watcher sends to

	// Written by open.
	restored *SyncedCopy // what a restored guest has of it, nil for a new volume
	tree     *os.File    // the source, however it is mounted on the host by now
	file     bool        // the source is a file
	bytes    int         // as counted in synced.bytes
	unwatch  func()

	users   int                      // guarded by synced.mu
	pushing chan struct{}            // guarded by synced.mu; closed when the first push has ended
	stop    context.CancelFunc       // guarded by synced.mu; nil unless it is followed
	pushed  error                    // read after pushing is closed
	sent    snapshot                 // what the guest has; of the one that pushes
	names   atomic.Pointer[[]string] // the paths in sent

	collects chan chan error // asks for what is written, once; what follow reads
	ended    chan struct{}   // closed when follow has ended
	known    []byte          // what the guest is told that the host knows; of the one that pushes
}

func newSynced(host *hostMounts, log *slog.Logger) *synced {
	s := &synced{host: host, log: log, volumes: map[volumeKey]*volume{}, users: map[string][]*volume{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.watch = sync.OnceValues(newWatcher)
	return s
}

// add makes the volume at source one of a container's and returns its path in the
// guest, where it is after push. It fails with ErrNotSynced for one that does not fit.
// was is what a restored guest has of it, nil for a volume that it does not know.
func (s *synced) add(container string, key volumeKey, was *SyncedCopy) (string, error) {
	if was != nil {
		key.name = was.Name
	}
	s.mu.Lock()
	v := s.volumes[key]
	if v == nil {
		name := key.name
		if name == "" {
			s.next++
			name = strconv.Itoa(s.next)
		}
		v = &volume{
			volumeKey: key, name: name, changed: make(chan struct{}, 1),
			collects: make(chan chan error), ended: make(chan struct{}),
		}
		v.open = sync.OnceValue(func() error { return s.open(v) })
		v.restored = was
		s.volumes[key] = v
	}
	v.users++
	s.mu.Unlock()
	if err := v.open(); err != nil {
		s.drop(v)
		return "", err
	}
	s.mu.Lock()
	s.users[container] = append(s.users[container], v)
	s.mu.Unlock()
	if path := v.inGuest(); was == nil || path == was.Path {
		return path, nil
	}
	return "", fmt.Errorf("%s is %s in the guest that is restored: a file must be one again, and a directory too", key.source, was.Path)
}

// open begins to watch before it looks, so that no change is missed.
func (s *synced) open(v *volume) (err error) {
	fd, err := s.host.tree(v.source, false)
	if err != nil {
		return fmt.Errorf("%s: %w", v.source, err)
	}
	v.tree = os.NewFile(uintptr(fd), v.source)
	st, err := v.tree.Stat()
	if err != nil {
		return err
	}
	v.file = st.Mode().IsRegular()
	if v.written {
		if err := v.checkWritten(st); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrNotSynced, v.source, err)
		}
	}
	watch, err := s.watch()
	if err != nil { // as a rule the host's bound on their number
		return fmt.Errorf("%w: %w", ErrNotSynced, err)
	}
	if v.unwatch, err = watch.add(v.path(), v.file, v.changed); err != nil {
		return fmt.Errorf("%w: watch %s: %w", ErrNotSynced, v.source, err)
	}
	now, err := v.scan()
	if err != nil {
		return fmt.Errorf("%w: %s: %w", ErrNotSynced, v.source, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := now.bytes(); s.bytes+n <= maxSyncedPod {
		v.bytes, s.bytes = n, s.bytes+n
		return nil
	}
	return fmt.Errorf("%w: %s: the pod's synced volumes would have more than %d bytes", ErrNotSynced, v.source, maxSyncedPod)
}

// path of the source for as long as tree is open.
func (v *volume) path() string { return fmt.Sprintf("/proc/self/fd/%d", v.tree.Fd()) }

func (v *volume) close() {
	if v.unwatch != nil {
		v.unwatch()
	}
	if v.tree != nil {
		v.tree.Close()
	}
}

// drop takes one user of a volume away; the last one's end is the volume's.
func (s *synced) drop(v *volume) {
	s.mu.Lock()
	v.users--
	last, stop := v.users == 0, v.stop
	if last {
		delete(s.volumes, v.volumeKey)
		s.bytes -= v.bytes
	}
	s.mu.Unlock()
	switch {
	case !last:
	case stop != nil:
		stop() // follow does the rest
	default:
		v.close()
	}
}

// remove gives a container's volumes back.
func (s *synced) remove(container string) {
	s.mu.Lock()
	volumes := s.users[container]
	delete(s.users, container)
	s.mu.Unlock()
	for _, v := range volumes {
		s.drop(v)
	}
}

// push copies the container's volumes into the guest, those that are not there
// yet, and keeps them up to date from then on.
func (s *synced) push(ctx context.Context, container string, guest agentpb.FilesService) error {
	s.mu.Lock()
	volumes := s.users[container]
	var first []*volume
	for _, v := range volumes {
		if v.pushing == nil {
			v.pushing = make(chan struct{})
			first = append(first, v)
		}
	}
	s.mu.Unlock()
	for _, v := range first {
		if v.restored != nil {
			v.pushed = v.resume(ctx, guest)
		} else {
			v.pushed = v.push(ctx, guest)
		}
		if v.pushed == nil && v.written {
			v.pushed = s.checkGuest(ctx, v, guest)
		}
		if v.pushed == nil {
			s.follow(v, guest)
		}
		close(v.pushing)
	}
	var errs []error
	for _, v := range volumes {
		select {
		case <-v.pushing:
			errs = append(errs, v.pushed)
		case <-ctx.Done():
			errs = append(errs, ctx.Err())
		}
	}
	return errors.Join(errs...)
}

// follow keeps the guest's copy of a volume up to date until its last user has
// gone, and then removes it.
func (s *synced) follow(v *volume, guest agentpb.FilesService) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	ctx, stop := context.WithCancel(s.ctx)
	v.stop = stop
	s.wg.Go(func() {
		defer stop()
		defer v.close()
		defer close(v.ended)
		v.update(ctx, guest, s.log)
		if s.ctx.Err() != nil || v.restored != nil {
			return // the guest ends too; or a container that nobody has taken over may have mounted it
		}
		_, err := guest.Sync(s.ctx, &agentpb.SyncFilesRequest{Volume: v.name, Removals: []string{"."}})
		if err != nil && s.ctx.Err() == nil {
			s.log.Warn("a volume's copy is left in the guest", "source", v.source, "error", fromGuest(err))
		}
	})
}

// update pushes every change, and takes what is written, until ctx ends.
func (v *volume) update(ctx context.Context, guest agentpb.FilesService, log *slog.Logger) {
	w := writes{v: v, ctx: ctx, guest: guest, log: log, told: make(chan written, 1)}
	defer w.wg.Wait()
	w.ask()
	for {
		select {
		case <-v.changed:
		case t := <-w.told:
			w.take(t)
			continue
		case done := <-v.collects:
			done <- w.collect()
			continue
		case <-ctx.Done():
			return
		}
		w.pushed = true
		if err := v.push(ctx, guest); err != nil && ctx.Err() == nil {
			// The guest keeps what it has; the volume's next change is another try.
			log.Warn("volume not updated", "source", v.source, "error", err)
		}
	}
}

// fromGuest makes an error of a call meaningful: what the guest has answered gets its
// kind; a lost connection stays what it is, so that the caller finds out why.
func fromGuest(err error) error {
	if _, answered := status.FromError(err); !answered {
		return err
	}
	return errgrpc.ToNative(err)
}

// push brings the guest's copy up to date.
func (v *volume) push(ctx context.Context, guest agentpb.FilesService) error {
	now, err := v.scan()
	if err != nil {
		return fmt.Errorf("volume %s: %w", v.source, err)
	}
	req := now.since(v.sent)
	if len(req.Files)+len(req.Removals) == 0 {
		return nil
	}
	req.Volume = v.name
	if _, err := guest.Sync(ctx, req); err != nil {
		return fmt.Errorf("volume %s: %w", v.source, fromGuest(err))
	}
	v.has(now)
	if v.written {
		v.known = digest(now[syncedFileName].Data)
	}
	return nil
}

// close ends everything; the guest is gone or about to be.
func (s *synced) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.wg.Wait()
	s.mu.Lock()
	containers := slices.Collect(maps.Keys(s.users))
	s.mu.Unlock()
	for _, c := range containers { // what was not followed
		s.remove(c)
	}
	if w, err := s.watch(); err == nil {
		w.close()
	}
}

// syncedKinds are what a synced volume may hold.
const syncedKinds = "directories, regular files and symbolic links"

func checkKind(mode uint32) error {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR, unix.S_IFREG, unix.S_IFLNK:
		return nil
	}
	return fmt.Errorf("it holds a %s: only %s are copied", kinds[mode&unix.S_IFMT], syncedKinds)
}
