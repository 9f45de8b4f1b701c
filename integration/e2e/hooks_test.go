// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/kata-v2/kata/images"
	"github.com/kata-v2/kata/images/cpio"
)

// TestGuestHooks runs hooks that a guest image brings: a second archive after
// the first one adds them and a shell to the root image, as the kernel allows.
func TestGuestHooks(t *testing.T) {
	b := newBox(t)
	shell := readFile(t, "/bin/busybox")
	hook := func(name string) cpio.Entry {
		return cpio.File("hooks/"+name+"/mark", 0o755, []byte(`#!/bin/busybox sh
for root in /run/kata-containers/shared/containers/*/rootfs; do echo "$0 $1" >> $root/marks; done
`))
	}
	var more bytes.Buffer
	if err := cpio.Write(&more, []cpio.Entry{
		cpio.Dir("bin", 0o755), cpio.File("bin/busybox", 0o755, []byte(shell)),
		cpio.Dir("hooks", 0o755), cpio.Dir("hooks/prestart", 0o755), hook("prestart"),
		cpio.Dir("hooks/poststart", 0o755), hook("poststart"),
	}); err != nil {
		t.Fatal(err)
	}
	// A directory without a manifest, which knows nothing of this image.
	dir := t.TempDir()
	built := filepath.Join(buildDir(t), "images")
	initrd := append([]byte(readFile(t, filepath.Join(built, images.InitrdFile))), more.Bytes()...)
	writeFile(t, string(initrd), dir, "initrd")
	if err := os.Symlink(filepath.Join(built, images.KernelFile), filepath.Join(dir, "vmlinux")); err != nil {
		t.Fatal(err)
	}
	text := readFile(t, b.c.ConfigFile())
	for key, value := range map[string]string{
		"initrd": filepath.Join(dir, "initrd"), "kernel": filepath.Join(dir, "vmlinux"), "manifest": "", "guest_hook_path": "/hooks",
	} {
		text = setKey(text, "hypervisor.qemu", key, strconv.Quote(value))
	}
	config := writeFile(t, text, dir, "kata.toml")
	b.start("hooked", []string{"--runtime-config-path", config}, "sleep", "1000")
	if got, want := b.shell("hooked", "cat /marks"), "/hooks/prestart/mark prestart\n/hooks/poststart/mark poststart"; got != want {
		t.Errorf("the hooks left %q, want %q", got, want)
	}
	b.remove("hooked")
}
