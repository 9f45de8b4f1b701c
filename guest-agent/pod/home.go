// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"bufio"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	homeKey = "HOME="
	// noHome is what a user has whom nobody knows, such as one of a platform
	// that gives each project its own number.
	noHome = "/"
	// maxPasswd bounds what is read of a file that comes from an image, in bytes.
	maxPasswd = 4 << 20
)

// addHome gives a process without HOME, or with an empty one, the home directory that the
// container's file says of its user. The engine would do the same, but leaves
// a user that is not in the file, and an empty value, as they are.
func addHome(p *specs.Process, root, passwd string) {
	i := slices.IndexFunc(p.Env, func(e string) bool { return strings.HasPrefix(e, homeKey) })
	if i >= 0 && p.Env[i] != homeKey {
		return
	}
	home, err := homeIn(root, passwd, p.User.UID)
	if err != nil {
		return // the engine says what is wrong, if the program cannot run for it
	}
	// The slice may be the request's.
	p.Env = append(slices.DeleteFunc(slices.Clone(p.Env), func(e string) bool { return e == homeKey }), homeKey+home)
}

// passwdOf is where a container will find /etc/passwd: a directory and a path below it.
func passwdOf(spec *specs.Spec) (root, path string) {
	const passwd = "/etc/passwd"
	for _, m := range slices.Backward(spec.Mounts) {
		dst := filepath.Clean(m.Destination)
		if dst == passwd {
			return filepath.Dir(m.Source), filepath.Base(m.Source)
		}
		if below, ok := strings.CutPrefix(passwd, dst+"/"); ok {
			return m.Source, below
		}
	}
	return spec.Root.Path, passwd
}

// homeIn looks a user up in a file (passwd(5)) of a container, out of which no link
// leads. Without a file nobody is known.
func homeIn(root, path string, uid uint32) (string, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return noHome, nil
	}
	if err != nil {
		return "", err
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, path, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if errors.Is(err, fs.ErrNotExist) {
		return noHome, nil
	}
	if err != nil {
		return "", err
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return noHome, err
	}
	want := strconv.FormatUint(uint64(uid), 10)
	for lines := bufio.NewScanner(io.LimitReader(f, maxPasswd)); lines.Scan(); {
		// name:password:uid:gid:comment:home:shell
		if field := strings.Split(lines.Text(), ":"); len(field) > 5 && field[2] == want && field[5] != "" {
			return field[5], nil
		}
	}
	return noHome, nil
}
