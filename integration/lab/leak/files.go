// SPDX-License-Identifier: Apache-2.0

package leak

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// foreignRun are directories and files of /run that the system's own services
// change at any time.
var foreignRun = []string{
	"/run/udev", "/run/systemd", "/run/user", "/run/log", "/run/utmp", "/run/dbus", "/run/mount", "/run/cloud-init",
	"/run/NetworkManager", "/run/blkid", "/run/lock/lvm", "/run/lvm", "/run/sudo", "/run/sshd", "/run/postgresql",
}

// EnvTemplate, when set, names a directory of templates that outlives the tests:
// nothing that lies in it is left behind.
const EnvTemplate = "KATA_LAB_TEMPLATE"

// foreign is what tree leaves out.
func foreign() []string {
	if dir := os.Getenv(EnvTemplate); dir != "" {
		return append([]string{filepath.Clean(dir)}, foreignRun...)
	}
	return foreignRun
}

// serviceCgroup matches the cgroups that systemd makes for its services, and
// those of user sessions.
var serviceCgroup = regexp.MustCompile(`/(system\.slice/[^/]+\.service|user\.slice)(/|$)`)

// cgroups collects every cgroup of every hierarchy below /sys/fs/cgroup.
func (s *State) cgroups() error {
	return filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if gone(err) {
				return nil
			}
			return err
		}
		if !d.IsDir() {
			return nil
		}
		if serviceCgroup.MatchString(path) {
			return fs.SkipDir
		}
		s.add(path, item{class: Cgroup, what: path})
		return nil
	})
}

// loops collects loop devices with a file behind them.
func (s *State) loops() error {
	found, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return err
	}
	for _, f := range found {
		backing, err := os.ReadFile(f)
		if gone(err) {
			continue
		}
		if err != nil {
			return err
		}
		device := strings.Split(f, "/")[3]
		file := strings.TrimSpace(string(backing))
		s.add(device+" "+file, item{class: Loop, what: fmt.Sprintf("/dev/%s of %s", device, file), path: file})
	}
	return nil
}

// files collects what lies where programs keep run-time state.
func (s *State) files(sc Scope) error {
	for _, dir := range append([]string{"/run", "/dev/shm"}, sc.Dirs...) {
		if err := s.tree(dir); err != nil {
			return fmt.Errorf("files of %s: %w", dir, err)
		}
	}
	for _, pattern := range append(append([]string(nil), defaultPatterns...), sc.Patterns...) {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return fmt.Errorf("pattern %s: %w", pattern, err)
		}
		for _, path := range found {
			s.add(path, item{class: File, what: path, path: path})
		}
	}
	return nil
}

// tree adds everything below dir on dir's own file system: what is mounted there
// is found as a mount, its contents are none of ours.
func (s *State) tree(dir string) error {
	var root unix.Stat_t
	if err := unix.Lstat(dir, &root); gone(err) {
		return nil
	} else if err != nil {
		return err
	}
	left := foreign()
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if gone(err) {
				return nil
			}
			return err
		}
		if below(path, left) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		var st unix.Stat_t
		if d.IsDir() {
			if err := unix.Lstat(path, &st); gone(err) {
				return nil
			} else if err != nil {
				return err
			}
		}
		s.add(path, item{class: File, what: path, path: path})
		if d.IsDir() && st.Dev != root.Dev {
			return fs.SkipDir
		}
		return nil
	})
}
