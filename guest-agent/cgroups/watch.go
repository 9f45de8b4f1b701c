// SPDX-License-Identifier: Apache-2.0

package cgroups

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Watcher tells when files change, by one inotify descriptor for the whole
// agent. The kernel raises a modify event for cgroup.events and memory.events
// (cgroup-v2.rst, "[un]populated notification").
type Watcher struct {
	f    *os.File
	mu   sync.Mutex
	subs map[int32]map[chan struct{}]struct{} // guarded by mu; by watch descriptor
}

// NewWatcher opens the descriptor; Run must follow.
func NewWatcher() (*Watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	return &Watcher{f: os.NewFile(uintptr(fd), "inotify"), subs: map[int32]map[chan struct{}]struct{}{}}, nil
}

// Run hands out events until ctx is done, then closes the descriptor.
func (w *Watcher) Run(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { w.f.Close() })
	defer stop()
	buf := make([]byte, 4096)
	for {
		n, err := w.f.Read(buf)
		if err != nil {
			return
		}
		w.dispatch(buf[:n])
	}
}

func (w *Watcher) dispatch(b []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	// struct inotify_event: s32 wd, u32 mask, u32 cookie, u32 len, name (inotify(7)).
	for len(b) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(b))
		name := int(binary.NativeEndian.Uint32(b[12:]))
		for ch := range w.subs[wd] {
			select {
			case ch <- struct{}{}:
			default: // a change is pending already; the reader looks at the file itself
			}
		}
		if unix.SizeofInotifyEvent+name > len(b) {
			return
		}
		b = b[unix.SizeofInotifyEvent+name:]
	}
}

// Add watches path. The channel receives after each change, several in a row at
// once; cancel ends the watch. Add first, then read the file: nothing is missed.
func (w *Watcher) Add(path string) (changed <-chan struct{}, cancel func(), err error) {
	ch := make(chan struct{}, 1)
	rc, err := w.f.SyscallConn()
	if err != nil {
		return nil, nil, fmt.Errorf("watch %s: %w", path, err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	var wd int
	var aerr error
	if err := rc.Control(func(fd uintptr) {
		// DELETE_SELF: the waiter of a removed group wakes up and sees it gone.
		wd, aerr = unix.InotifyAddWatch(int(fd), path, unix.IN_MODIFY|unix.IN_DELETE_SELF)
	}); err != nil {
		return nil, nil, fmt.Errorf("watch %s: %w", path, err)
	}
	if aerr != nil {
		return nil, nil, &os.PathError{Op: "watch", Path: path, Err: aerr}
	}
	id := int32(wd)
	if w.subs[id] == nil {
		w.subs[id] = map[chan struct{}]struct{}{}
	}
	w.subs[id][ch] = struct{}{}
	return ch, func() { w.drop(id, ch) }, nil
}

func (w *Watcher) drop(id int32, ch chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.subs[id], ch)
	if len(w.subs[id]) > 0 {
		return
	}
	delete(w.subs, id)
	if rc, err := w.f.SyscallConn(); err == nil {
		// EINVAL: the file is gone and took its watch with it.
		_ = rc.Control(func(fd uintptr) { _, _ = unix.InotifyRmWatch(int(fd), uint32(id)) })
	}
}
