// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// What is watched (inotify(7)): the names in a volume and its own attributes; a
// file's content and attributes.
const (
	watchDir  = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_ATTRIB | unix.IN_ONLYDIR
	watchFile = unix.IN_MODIFY | unix.IN_CLOSE_WRITE | unix.IN_ATTRIB
)

// watcher is one inotify instance for all volumes of a pod: the host bounds
// their number for each user (fs.inotify.max_user_instances, 128 as a rule).
type watcher struct {
	f    *os.File
	done chan struct{} // closed when run has ended

	mu      sync.Mutex
	fd      int                            // guarded by mu; of f, -1 once it is closed
	targets map[int]map[chan struct{}]bool // guarded by mu; by watch descriptor
}

// newWatcher makes one; its owner closes it.
func newWatcher() (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	w := &watcher{f: os.NewFile(uintptr(fd), "inotify"), done: make(chan struct{}), fd: fd, targets: map[int]map[chan struct{}]bool{}}
	go w.run()
	return w, nil
}

// add makes every change of path send to changed, which has room for one. Two
// paths of one inode have one watch descriptor.
func (w *watcher) add(path string, file bool, changed chan struct{}) (remove func(), err error) {
	mask := uint32(watchDir)
	if file {
		mask = watchFile
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	wd, err := unix.InotifyAddWatch(w.fd, path, mask)
	if err != nil {
		return nil, err
	}
	if w.targets[wd] == nil {
		w.targets[wd] = map[chan struct{}]bool{}
	}
	w.targets[wd][changed] = true
	return func() { w.remove(wd, changed) }, nil
}

func (w *watcher) remove(wd int, changed chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.targets[wd], changed)
	if len(w.targets[wd]) == 0 {
		delete(w.targets, wd)
		unix.InotifyRmWatch(w.fd, uint32(wd)) //nolint:errcheck // gone with its inode is fine
	}
}

// run reads events until close.
func (w *watcher) run() {
	defer close(w.done)
	buf := make([]byte, 16<<10)
	for {
		n, err := w.f.Read(buf)
		if err != nil {
			return
		}
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			wd := int(int32(binary.NativeEndian.Uint32(b)))
			mask, size := binary.NativeEndian.Uint32(b[4:]), binary.NativeEndian.Uint32(b[12:])
			b = b[min(len(b), unix.SizeofInotifyEvent+int(size)):]
			w.tell(wd, mask&unix.IN_Q_OVERFLOW != 0)
		}
	}
}

// tell wakes who is interested in wd, or everybody when events were lost.
func (w *watcher) tell(wd int, all bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for d, targets := range w.targets {
		if d != wd && !all {
			continue
		}
		for changed := range targets {
			select {
			case changed <- struct{}{}:
			default: // it has not looked since the last one
			}
		}
	}
}

// close ends run and waits for it.
func (w *watcher) close() {
	w.mu.Lock()
	w.fd = -1
	w.mu.Unlock()
	w.f.Close()
	<-w.done
}
