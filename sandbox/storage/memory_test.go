// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMemoryVolume(t *testing.T) {
	h := newHost(t)
	s := h.share()
	dir := t.TempDir()
	h.do(func() error {
		return errors.Join(os.Mkdir(dir+"/tmpfs", 0o755), unix.Mount("tmpfs", dir+"/tmpfs", "tmpfs", 0, "size=64k,mode=2770,uid=5,gid=6"),
			os.Mkdir(dir+"/tmpfs/below", 0o755), os.Mkdir(dir+"/plain", 0o755), os.Symlink("tmpfs", dir+"/link"))
	})
	v, err := s.MemoryVolume(dir + "/tmpfs")
	must(t, err)
	if v == nil || *v != (MemoryVolume{Bytes: 64 << 10, Mode: 0o2770, UID: 5, GID: 6}) {
		t.Errorf("%+v", v)
	}
	for _, name := range []string{"/plain", "/tmpfs/below", "/link"} {
		if v, err := s.MemoryVolume(dir + name); v != nil || err != nil {
			t.Errorf("%s: %+v, %v", name, v, err)
		}
	}
	if _, err := s.MemoryVolume(dir + "/missing"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}
