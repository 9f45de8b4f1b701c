// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/integration/lab"
)

// refused: the run fails with all the words in its error.
func (b *box) refused(what string, r lab.Result, words ...string) {
	b.Helper()
	if r.Code == 0 {
		b.Errorf("%s: it ran", what)
	}
	for _, w := range words {
		if !strings.Contains(r.Stderr, w) {
			b.Errorf("%s: the error does not name %q: %s", what, w, r.Stderr)
		}
	}
}

// testRefusedInPod: a container that a machine cannot hold does not disturb the
// pod that it asks to join.
func testRefusedInPod(b *box) {
	s := member(b.T, "true")
	s.Linux.Namespaces[4].Path = hostNetNS()
	b.refused("the host's network namespace", b.runSpec("refused", s), "linux.namespaces[4].path", "host")
	s = member(b.T, "true").mount("bind", b.TempDir(), "/x", "rbind", "rshared")
	b.refused("Bidirectional", b.runSpec("refused", s), "mounts[8].options", "rshared", "rslave")
	s = member(b.T, "true").mount("bind", "/no/such/source", "/x", "rbind")
	b.refused("missing source", b.runSpec("refused", s), "mounts[8]", "/no/such/source")
	s = member(b.T, "true")
	s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/sdz", Type: "b", Major: 8, Minor: 400}}
	b.refused("block device", b.runSpec("refused", s), "linux.devices[0]", "/dev/sdz")
	b.want(b.exec(podID, "echo", "alive"), 0, "alive\n")
}

// hostNetNS is the host's network namespace under a path that needs no rights
// over process 1.
func hostNetNS() string { return fmt.Sprintf("/proc/%d/ns/net", os.Getpid()) }

// configWith writes a copy of the lab's configuration with one key changed, or
// with a line added to its section.
func (b *box) configWith(section, key, value string) string {
	b.Helper()
	data, err := os.ReadFile(b.c.ConfigFile())
	if err != nil {
		b.Fatal(err)
	}
	return writeFile(b.T, setKey(string(data), section, key, value), b.TempDir(), "kata.toml")
}

// setKey replaces a key of a configuration's text, or adds it to its section.
func setKey(text, section, key, value string) string {
	line := key + " = " + value
	old := regexp.MustCompile(`(?m)^` + key + ` = .*$`)
	if old.MatchString(text) {
		return old.ReplaceAllLiteralString(text, line)
	}
	return strings.Replace(text, "["+section+"]\n", "["+section+"]\n"+line+"\n", 1)
}

// TestRefusedConfiguration: what is missing or wrong is named with its file and
// key, soon, and nothing is left.
func TestRefusedConfiguration(t *testing.T) {
	b := newBox(t)
	const q = "hypervisor.qemu"
	images := filepath.Join(buildDir(t), "images")
	whole := []byte(readFile(t, filepath.Join(images, "kata-initrd.img")))
	longer := writeFile(t, string(whole)+"x", t.TempDir(), "kata-initrd.img")
	whole[len(whole)/2] ^= 1
	corrupt := writeFile(t, string(whole), t.TempDir(), "kata-initrd.img")
	missing := filepath.Join(t.TempDir(), "none")
	for _, c := range []struct {
		name, section, key, value string
		words                     []string
	}{
		{"missing kernel", q, "kernel", missing, []string{missing, q + ".kernel"}},
		{"missing initrd", q, "initrd", missing, []string{missing, q + ".initrd"}},
		{"missing QEMU", q, "path", missing, []string{missing, q + ".path"}},
		{"missing virtiofsd", q, "virtio_fs_daemon", missing, []string{missing, q + ".virtio_fs_daemon"}},
		{"missing manifest", q, "manifest", missing, []string{missing, q + ".manifest"}},
		{"corrupt initrd", q, "initrd", corrupt, []string{corrupt, q + ".initrd", "manifest.json", "sha256"}},
		{"longer initrd", q, "initrd", longer, []string{longer, q + ".initrd", "manifest.json", "size"}},
		{"directory as kernel", q, "kernel", t.TempDir(), []string{q + ".kernel"}},
	} {
		b.refused(c.name, b.run("refused", []string{"--runtime-config-path", b.configWith(c.section, c.key, strconv.Quote(c.value))}, "true"), c.words...)
	}
	conf := b.configWith(q, "kernal", `"/x"`)
	b.refused("unknown key", b.run("refused", []string{"--runtime-config-path", conf}, "true"), conf, "kernal", "kernel")
	conf = b.configWith(q, "default_memory", `"much"`)
	b.refused("wrong type", b.run("refused", []string{"--runtime-config-path", conf}, "true"), conf, "default_memory", "whole number")
	conf = b.configWith(q, "default_memory", `1`)
	b.refused("out of range", b.run("refused", []string{"--runtime-config-path", conf}, "true"), conf, "default_memory", "64")
	b.refused("no such file", b.run("refused", []string{"--runtime-config-path", missing}, "true"), missing)
	conf = writeFile(t, "[hypervisor.qemu\n", t.TempDir(), "kata.toml")
	b.refused("no TOML", b.run("refused", []string{"--runtime-config-path", conf}, "true"), conf, "1")
}

// TestRefusedSpecification: what cannot work in a machine is refused before one is started.
func TestRefusedSpecification(t *testing.T) {
	b := newBox(t)
	began := time.Now()
	b.refused("host network", b.run("refused", []string{"--net-host"}, "true"), "linux.namespaces", "network namespace")
	b.refused("the host's network namespace", b.run("refused", []string{"--with-ns", "network:" + hostNetNS()}, "true"), "linux.namespaces", "host's network namespace")
	foreign := exec.Command("unshare", "--net", "sh", "-c", "echo up; exec sleep 1000")
	up, err := foreign.StdoutPipe()
	if err == nil {
		err = foreign.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = foreign.Process.Kill(); _ = foreign.Wait() })
	if _, err := up.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/proc/%d/ns/net", foreign.Process.Pid)
	b.refused("another container's network", b.run("refused", []string{"--with-ns", "network:" + path}, "true"), "linux.namespaces", path, "another container")
	b.refused("rshared", b.run("refused", []string{"--mount", "type=bind,src=" + t.TempDir() + ",dst=/x,options=rbind:rshared"}, "true"), "mounts[", "/x", "rshared", "rslave")
	s := newSpec(t, "true").mount("bind", "/no/such/source", "/x", "rbind")
	b.refused("missing source", b.runSpec("refused", s), "mounts[8]", "/no/such/source")
	s = newSpec(t)
	b.refused("no command", b.runSpec("refused", s), "process.args")
	s = newSpec(t, "true")
	s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/sdz", Type: "b", Major: 8, Minor: 400}}
	b.refused("block device", b.runSpec("refused", s), "linux.devices[0]", "/dev/sdz")
	s = newSpec(t, "true")
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	b.refused("user namespace", b.runSpec("refused", s), "linux.namespaces", "user namespaces are not supported")
	s = newSpec(t, "true").group("../x")
	b.refused("group with a slash", b.runSpec("refused", s), groupAnnotation, "../x")
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("nine refusals took %v: was a machine started?", took)
	}
}

// TestMissingExecutable: in the first container of a pod, whose machine must go too.
func TestMissingExecutable(t *testing.T) {
	b := newBox(t)
	b.refused("run", b.run("missing", nil, "no-such-program"), "no-such-program")
}
