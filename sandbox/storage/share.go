// SPDX-License-Identifier: Apache-2.0

// Package storage brings files of the host into the guest: the directory that
// virtio-fs shares with everything mounted below it, and the daemon that serves it.
//
// All mounts are made in the mount namespace of this process, which is the
// shim's own, so that they cannot outlive it. The share's directory is a shared
// mount: what is mounted below it later appears in the daemon's namespace too.
package storage

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// Share is a host directory that the guest sees at protocols.GuestSharedDir.
type Share struct {
	dir      string
	host     hostMounts
	synced   *synced
	mounting sync.WaitGroup // Rootfs and Bind under way; Add only while mu is held and closed is false

	mu       sync.Mutex
	pod      map[podKey]*podVolume    // guarded by mu
	podOf    map[string][]*podVolume  // guarded by mu; container id → those it uses
	pods     int                      // guarded by mu; how many BindPod has made
	entries  map[string][]string      // guarded by mu; container id → mount points or files, oldest first
	names    map[string]string        // guarded by mu; container id → what its names in dir begin with
	named    map[string]int           // guarded by mu; container id → how many containers have had it
	removing map[string]chan struct{} // guarded by mu; container id → closed when its Remove under way has ended
	closed   bool                     // guarded by mu
}

// NewShare makes dir and turns it into a shared mount of its own. host is the
// mount namespace that the sources of later mounts are in, nil for this process's.
func NewShare(dir string, host *os.File, log *slog.Logger) (*Share, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("share: %w", err)
	}
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		os.Remove(dir)
		return nil, fmt.Errorf("share: bind %s: %w", dir, err)
	}
	shared := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NODEV, Propagation: unix.MS_SHARED}
	if err := unix.MountSetattr(unix.AT_FDCWD, dir, 0, &shared); err != nil {
		unix.Unmount(dir, unix.MNT_DETACH)
		os.Remove(dir)
		return nil, fmt.Errorf("share: make %s shared (it needs Linux 5.12): %w", dir, err)
	}
	s := &Share{
		dir: dir, host: hostMounts{ns: host}, pod: map[podKey]*podVolume{}, podOf: map[string][]*podVolume{}, entries: map[string][]string{},
		names: map[string]string{}, named: map[string]int{}, removing: map[string]chan struct{}{},
	}
	s.synced = newSynced(&s.host, log)
	return s, nil
}

// Dir is the host directory to share.
func (s *Share) Dir() string { return s.dir }

// Rootfs mounts a container's root filesystem and returns its path in the
// guest. Without mounts, bundleRootfs is bound instead.
func (s *Share) Rootfs(container string, mounts []Mount, bundleRootfs string) (string, error) {
	if err := s.begin(); err != nil {
		return "", err
	}
	defer s.mounting.Done()
	rel := filepath.Join(s.name(container), "rootfs")
	target := filepath.Join(s.dir, rel)
	if err := os.MkdirAll(target, 0o755); err != nil {
		return "", fmt.Errorf("rootfs: %w", err)
	}
	if len(mounts) == 0 {
		mounts = []Mount{{Type: "bind", Source: bundleRootfs, Options: []string{"rbind"}}}
	}
	if err := s.host.mountAll(mounts, target); err != nil {
		return "", errors.Join(err, os.Remove(target), os.Remove(filepath.Dir(target)))
	}
	for range mounts {
		s.note(container, target)
	}
	return filepath.Join(protocols.GuestSharedDir, rel), nil
}

// Sync makes a small volume, or file, of the host one of a container's and returns
// its path in the guest, where Push copies it. Only a file can be one that the
// container writes to. ErrNotSynced, in the error, says that it does not fit; it
// may be bound instead. was is the copy that a restored guest has, nil for none.
func (s *Share) Sync(container, source string, writable bool, was *SyncedCopy) (string, error) {
	if err := s.begin(); err != nil {
		return "", err
	}
	defer s.mounting.Done()
	return s.synced.add(container, volumeKey{source: source, written: writable}, was)
}

// Collect brings what the container has written into its files to the host. It is
// for a container that has ended, and bounded by ctx.
func (s *Share) Collect(ctx context.Context, container string) error {
	return s.synced.collect(ctx, container)
}

// Push copies the container's volumes that were made by Sync into the guest, and
// keeps them up to date from then on. For a guest that knows no such volumes the
// error is errdefs' NotImplemented; Unsync and Bind are the way then.
func (s *Share) Push(ctx context.Context, container string, guest agentpb.FilesService) error {
	if err := s.begin(); err != nil {
		return err
	}
	defer s.mounting.Done()
	return s.synced.push(ctx, container, guest)
}

// Unsync gives the container's volumes that were made by Sync back.
func (s *Share) Unsync(container string) { s.synced.remove(container) }

// BindOptions say how a host file or directory appears in the share.
type BindOptions struct {
	// Recursive takes along what is mounted below the source.
	Recursive bool
	// ReadOnly takes no writes, with Recursive also below.
	ReadOnly bool
	// Private leaves out what the host mounts below the source from now on.
	Private bool
}

// Bind makes a host file or directory appear in the share and returns its path
// in the guest. index tells the mounts of one container apart.
func (s *Share) Bind(container string, index int, source string, o BindOptions) (string, error) {
	if err := s.begin(); err != nil {
		return "", err
	}
	defer s.mounting.Done()
	fd, err := s.host.tree(source, o.Recursive)
	if err != nil {
		return "", fmt.Errorf("%s: %w", source, err)
	}
	defer unix.Close(fd)
	name := s.name(container) + "-" + strconv.Itoa(index) + "-" + filepath.Base(source)
	target := filepath.Join(s.dir, name)
	if err := mountPoint(fd, source, target); err != nil {
		return "", err
	}
	flags := uintptr(unix.MS_BIND)
	for flag, set := range map[uintptr]bool{unix.MS_REC: o.Recursive, unix.MS_RDONLY: o.ReadOnly, unix.MS_PRIVATE: o.Private} {
		if set {
			flags |= flag
		}
	}
	if err := place(fd, target, flags); err != nil {
		return "", errors.Join(fmt.Errorf("bind %s: %w", source, err), os.Remove(target))
	}
	s.note(container, target)
	return filepath.Join(protocols.GuestSharedDir, name), nil
}

// kinds are the types of files that a share cannot carry.
var kinds = map[uint32]string{unix.S_IFCHR: "character device", unix.S_IFBLK: "block device", unix.S_IFIFO: "FIFO"}

// mountPoint makes an empty directory or file for what fd, opened from source, is.
func mountPoint(fd int, source, target string) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("%s: %w", source, err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return os.Mkdir(target, 0o755)
	case unix.S_IFREG, unix.S_IFSOCK:
		return os.WriteFile(target, nil, 0o644)
	}
	return fmt.Errorf("%s is a %s: only directories, regular files and sockets can be shared with the guest", source, kinds[st.Mode&unix.S_IFMT])
}

// begin holds Close off until what is being mounted is noted; a closed share takes nothing.
func (s *Share) begin() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fmt.Errorf("share %s is closed", s.dir)
	}
	s.mounting.Add(1)
	return nil
}

// name is what the container's names in the share begin with. No two containers have
// the same, also when they follow each other with one id: the guest goes by what it
// knows of a name for a second, and would give the second the first one's files.
func (s *Share) name(container string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	name, ok := s.names[container]
	if !ok {
		if name = container; s.named[container] > 0 {
			name += "--" + strconv.Itoa(s.named[container]) // no id has two dashes together
		}
		s.named[container]++
		s.names[container] = name
	}
	return name
}

// note remembers a mount point.
func (s *Share) note(container, target string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.entries[container] = append(s.entries[container], target)
}

// Holds tells whether the host has mounted something in the share for a container.
func (s *Share) Holds(container string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.entries[container]) > 0 || len(s.podOf[container]) > 0
}

// Remove takes everything of a container out of the share; it is idempotent. Of
// two at the same time, the machine's end is often one, the second waits for the
// first, which has the error.
func (s *Share) Remove(container string) error {
	s.mu.Lock()
	if other, ok := s.removing[container]; ok {
		s.mu.Unlock()
		<-other
		return nil
	}
	done := make(chan struct{})
	s.removing[container] = done
	targets, volumes, name := s.entries[container], s.podOf[container], s.names[container]
	delete(s.entries, container)
	delete(s.names, container)
	delete(s.podOf, container)
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.removing, container)
		s.mu.Unlock()
		close(done)
	}()
	s.Unsync(container)
	var errs []error
	for _, v := range volumes {
		errs = append(errs, s.drop(v))
	}
	for i := len(targets) - 1; i >= 0; i-- {
		if err := unix.Unmount(targets[i], unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", targets[i], err))
		}
	}
	for _, t := range targets {
		// Never recursive: what is still mounted there must not be emptied.
		if err := os.Remove(t); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if name != "" { // its directory, if it had a root there
		if err := os.Remove(filepath.Join(s.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Close removes all containers, also those that are being mounted, and the directory itself.
func (s *Share) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.mounting.Wait()
	s.synced.close()
	s.host.close()
	s.mu.Lock()
	var ids []string
	for id := range s.entries {
		ids = append(ids, id)
	}
	for id := range s.removing {
		ids = append(ids, id)
	}
	s.mu.Unlock()
	var errs []error
	for _, id := range ids {
		errs = append(errs, s.Remove(id))
	}
	if err := unix.Unmount(s.dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		errs = append(errs, fmt.Errorf("unmount %s: %w", s.dir, err))
	}
	if err := os.Remove(s.dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
