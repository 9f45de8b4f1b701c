// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// BusyboxImage is the image that ImportBusybox provides: Debian's static busybox
// with a link for each applet, /bin/sh included, and the users root, daemon,
// user (1000) and nobody.
const BusyboxImage = "docker.io/library/busybox:latest"

// busyboxLayout changes when the image's content does; it is part of the cache key of every image.
const busyboxLayout = "2"

// busyboxBinary is where Debian's busybox-static (and busybox) puts the program.
var busyboxBinary = []string{"/bin/busybox", "/usr/bin/busybox"}

// BusyboxTar returns the path of an OCI layout tar of BusyboxImage.
func BusyboxTar() (string, error) { return cachedImage("busybox", busyboxImage) }

// Busybox is BusyboxImage, for images that are made on top of it.
func Busybox() (Image, error) {
	binary, err := readBusybox()
	if err != nil {
		return Image{}, err
	}
	return busyboxImage(binary)
}

// cachedImage returns the path of an OCI layout tar of an image that is made of
// Debian's busybox, built on first use and cached by the digest of the program.
func cachedImage(name string, build func(busybox []byte) (Image, error)) (string, error) {
	base, err := Dir()
	if err != nil {
		return "", err
	}
	binary, err := readBusybox()
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(append([]byte(busyboxLayout), binary...))
	dir := filepath.Join(base, "images")
	out := filepath.Join(dir, name+"-"+hex.EncodeToString(sum[:6])+".tar")
	if _, err := os.Stat(out); err == nil {
		return out, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("lab: %s image: %w", name, err)
	}
	img, err := build(binary)
	if err != nil {
		return "", err
	}
	// Written beside and renamed: a reader sees a whole image or none.
	tmp, err := os.CreateTemp(dir, "."+name+"-*")
	if err != nil {
		return "", fmt.Errorf("lab: %s image: %w", name, err)
	}
	defer os.Remove(tmp.Name())
	if err := errors.Join(img.Write(tmp), tmp.Close()); err != nil {
		return "", err
	}
	if err := os.Rename(tmp.Name(), out); err != nil {
		return "", fmt.Errorf("lab: %s image: %w", name, err)
	}
	return out, nil
}

func readBusybox() ([]byte, error) {
	var errs []error
	for _, p := range busyboxBinary {
		data, err := os.ReadFile(p)
		if err == nil {
			return data, nil
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("lab: busybox: install Debian's busybox-static: %w", errors.Join(errs...))
}

func busyboxImage(binary []byte) (Image, error) {
	var list []byte
	var err error
	for _, p := range busyboxBinary {
		if list, err = exec.Command(p, "--list").Output(); err == nil {
			break
		}
	}
	if err != nil {
		return Image{}, fmt.Errorf("lab: busybox --list: %w", err)
	}
	files := []File{
		{Path: "bin/busybox", Mode: 0o755, Data: binary},
		{Path: "tmp", Mode: 0o1777, Dir: true}, {Path: "var/tmp", Mode: 0o1777, Dir: true},
		{Path: "root", Mode: 0o700, Dir: true}, {Path: "home/user", Mode: 0o755, Dir: true, UID: 1000, GID: 1000},
		{Path: "etc/passwd", Mode: 0o644, Data: []byte("root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/:/bin/false\nuser:x:1000:1000:user:/home/user:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")},
		{Path: "etc/group", Mode: 0o644, Data: []byte("root:x:0:\ndaemon:x:1:\nwheel:x:10:user\nuser:x:1000:\nnogroup:x:65534:\n")},
	}
	for _, dir := range []string{"dev", "proc", "sys", "run", "mnt"} {
		files = append(files, File{Path: dir, Mode: 0o755, Dir: true})
	}
	for _, applet := range strings.Fields(string(list)) {
		if applet != "busybox" {
			files = append(files, File{Path: "bin/" + applet, Link: "busybox"})
		}
	}
	return Image{
		Name: BusyboxImage, Layers: [][]File{files},
		Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, Cmd: []string{"sh"},
	}, nil
}
