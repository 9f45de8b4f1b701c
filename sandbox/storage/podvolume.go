// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/protocols"
)

// podKey is what containers that see the same files agree in.
type podKey struct {
	source string
	what   string // hostMounts.identity
	how    BindOptions
}

// podVolume is a file or directory that containers of the pod share with each other.
type podVolume struct {
	key   podKey
	id    string                 // in the place of a container's
	bind  func() (string, error) // once
	users int                    // guarded by Share.mu
}

// BindPod is Bind for what other containers of the pod may have too. What they mount
// in the same way appears once: so they see the same files by the same inodes, without
// which a lock that one holds is free for the other, a socket or FIFO leads to nobody,
// and inotify tells of nothing. A source that has been replaced meanwhile, or below
// which the host has mounted something, is another.
func (s *Share) BindPod(container, source string, how BindOptions) (string, error) {
	if err := s.begin(); err != nil {
		return "", err
	}
	what, err := s.host.identity(source, how.Recursive)
	s.mounting.Done()
	if err != nil {
		return "", fmt.Errorf("%s: %w", source, err)
	}
	key := podKey{source: source, what: what, how: how}
	s.mu.Lock()
	v := s.pod[key]
	if v == nil {
		v = &podVolume{key: key, id: protocols.PodSharePrefix + strconv.Itoa(s.pods)}
		v.bind = sync.OnceValues(func() (string, error) { return s.Bind(v.id, 0, source, how) })
		s.pod[key] = v
		s.pods++
	}
	v.users++
	s.mu.Unlock()
	path, err := v.bind()
	if err != nil {
		return "", errors.Join(err, s.drop(v))
	}
	s.mu.Lock()
	s.podOf[container] = append(s.podOf[container], v)
	s.mu.Unlock()
	return path, nil
}

// drop takes one user of a pod's volume away; it goes with the last one.
func (s *Share) drop(v *podVolume) error {
	s.mu.Lock()
	v.users--
	last := v.users == 0
	if last && s.pod[v.key] == v {
		delete(s.pod, v.key)
	}
	s.mu.Unlock()
	if !last {
		return nil
	}
	return s.Remove(v.id)
}

// identity tells what a source is at the moment: the file, the mount that it is on,
// and with recursive the mounts below it.
func (h *hostMounts) identity(source string, recursive bool) (string, error) {
	var what strings.Builder
	err := h.do(func() error {
		fd, err := unix.Open(source, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		var st unix.Statx_t
		if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_INO|unix.STATX_MNT_ID, &st); err != nil {
			return err
		}
		fmt.Fprint(&what, st.Mnt_id, " ", st.Dev_major, ":", st.Dev_minor, " ", st.Ino)
		if !recursive {
			return nil
		}
		path, err := os.Readlink(fmt.Sprintf("/proc/thread-self/fd/%d", fd))
		if err != nil {
			return err
		}
		mounts, err := os.ReadFile("/proc/thread-self/mountinfo")
		if err != nil {
			return err
		}
		below := strings.TrimSuffix(escapeMount.Replace(path), "/") + "/"
		for line := range strings.Lines(string(mounts)) {
			if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], below) {
				fmt.Fprint(&what, " ", f[0])
			}
		}
		return nil
	})
	return what.String(), err
}

// escapeMount writes a path as mountinfo does (kernel fs/proc_namespace.c, mangle).
var escapeMount = strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`)
