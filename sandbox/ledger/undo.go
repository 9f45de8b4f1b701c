// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// errUnknownKind marks an entry that a newer build wrote.
var errUnknownKind = errors.New("this build does not know the kind; reap it with the build that wrote it")

// undo removes what e names. What does not exist (any more) is done.
func undo(ctx context.Context, e Entry) error {
	switch e.Kind {
	case KindProcess, KindLink, KindIngress, KindFilter, KindQdisc, KindCgroup, KindCgroupParent, KindMount, KindNetNS, KindLoop, KindFile, KindSocket, KindDir:
		if err := e.check(); err != nil {
			return err
		}
	}
	switch e.Kind {
	case KindProcess:
		_, err := killProcess(ctx, Proc{PID: e.PID, Start: e.Start})
		return err
	case KindLink:
		return removeLink(e)
	case KindIngress:
		return removeIngress(e)
	case KindFilter:
		return removeFilter(e)
	case KindQdisc:
		return removeQdisc(e)
	case KindCgroup:
		return RemoveCgroup(ctx, e.Path)
	case KindCgroupParent:
		return RemoveCgroupParent(e.Path)
	case KindMount:
		return unmount(e.Path)
	case KindNetNS:
		return removeNetNS(e.Path)
	case KindLoop:
		return detachLoop(e)
	case KindFile:
		return removeFile(e.Path)
	case KindSocket:
		return removeSocket(e.Path)
	case KindDir:
		return removeTree(e.Path)
	}
	return errUnknownKind
}

// unmount takes everything off a mount point, also what is stacked on it.
func unmount(path string) error {
	for {
		mounted, err := isMountPoint(path)
		if err != nil || !mounted {
			return err
		}
		// Detached: a busy mount disappears from the tree now and for good later.
		err = unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return &os.PathError{Op: "umount", Path: path, Err: err}
		}
	}
}

// isMountPoint looks path up in this process's mount table (proc(5), field 5 of
// mountinfo, with octal escapes).
func isMountPoint(path string) (bool, error) {
	// The table names real paths.
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return false, ignoreMissing(err)
	}
	want := escapeMount(filepath.Join(dir, filepath.Base(path)))
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return false, err
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		if fields := strings.SplitN(sc.Text(), " ", 6); len(fields) > 5 && fields[4] == want {
			return true, nil
		}
	}
	return false, sc.Err()
}

func escapeMount(s string) string {
	return strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`).Replace(s)
}

// detachLoop frees a loop device if its file is still the recorded one.
func detachLoop(e Entry) error {
	b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(e.Path), "loop/backing_file"))
	if errors.Is(err, os.ErrNotExist) {
		return nil // not attached
	}
	if err != nil {
		return err
	}
	if strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), " (deleted)") != e.Backing {
		return nil // somebody else's by now
	}
	f, err := os.Open(e.Path)
	if err != nil {
		return ignoreMissing(err)
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0); err != nil && !errors.Is(err, unix.ENXIO) {
		return &os.PathError{Op: "LOOP_CLR_FD", Path: e.Path, Err: err}
	}
	return nil
}

func removeFile(path string) error {
	if err := unix.Unlink(path); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR) {
		return &os.PathError{Op: "unlink", Path: path, Err: err}
	}
	return nil
}

func removeSocket(path string) error {
	st, err := os.Lstat(path)
	if err != nil {
		return ignoreMissing(err)
	}
	if st.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("%s is not a socket", path)
	}
	return removeFile(path)
}
