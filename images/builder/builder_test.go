// SPDX-License-Identifier: Apache-2.0

package builder

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kata-v2/kata/images"
	"github.com/kata-v2/kata/images/modules"
)

// options describe a kernel package whose kernel is stored and which has no modules.
func options(t *testing.T, agentSize int) Options {
	t.Helper()
	pkg, out := t.TempDir(), t.TempDir()
	kernel := make([]byte, 1024+4096)
	kernel[0x1f1] = 1 // one sector of set-up code
	copy(kernel[0x202:], "HdrS\x0f\x02")
	binary.LittleEndian.PutUint32(kernel[0x24c:], 4096)
	copy(kernel[1024:], "\x7fELF")
	for name, data := range map[string][]byte{
		"boot/vmlinuz-6.1.0-9-cloud-amd64":                kernel,
		"lib/modules/6.1.0-9-cloud-amd64/modules.builtin": []byte("kernel/a.ko\n"),
		"version": []byte("6.1.9-1\n"), "agent": bytes.Repeat([]byte("a"), agentSize), "crun": []byte("crun"),
	} {
		path := filepath.Join(pkg, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return Options{
		Agent: filepath.Join(pkg, "agent"), Engine: filepath.Join(pkg, "crun"), KernelPackage: pkg, PackageName: "linux-image-9",
		Modules: []modules.Want{{Group: modules.Boot, Name: "a"}}, Version: "v1", AgentVersion: "v1", EngineVersion: "1.8.1", Out: out,
	}
}

func TestBuildIsRepeatableAndVerifies(t *testing.T) {
	o := options(t, 1000)
	m, err := Build(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Verify(o.Out); err == nil {
		read, err := images.ReadManifest(filepath.Join(o.Out, images.ManifestFile))
		if err != nil || read.Kernel != (images.Kernel{Package: "linux-image-9", Version: "6.1.9-1", Release: "6.1.0-9-cloud-amd64"}) || read.CreatedFrom["crun"] != "1.8.1" {
			t.Errorf("manifest is %+v, %v", read, err)
		}
	} else {
		t.Error(err)
	}
	before, err := os.Stat(filepath.Join(o.Out, images.InitrdFile))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Build(o); err != nil {
		t.Fatal(err)
	}
	after, err := os.Stat(filepath.Join(o.Out, images.InitrdFile))
	if err != nil || !os.SameFile(before, after) || !before.ModTime().Equal(after.ModTime()) {
		t.Errorf("the second build of the same input replaced the image (%v)", err)
	}
	left, err := os.ReadDir(o.Out)
	if err != nil || len(left) != 3 {
		t.Errorf("%d files in the output, %v; want kernel, image and manifest", len(left), err)
	}
}

// A kernel of `make kernel` is an ELF file from the start, with everything built in.
func TestBuildOfAnUncompressedKernel(t *testing.T) {
	o := options(t, 1000)
	boot := filepath.Join(o.KernelPackage, "boot")
	if err := os.RemoveAll(boot); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(boot, 0o755); err != nil {
		t.Fatal(err)
	}
	vmlinux := []byte("\x7fELF and so on")
	if err := os.WriteFile(filepath.Join(boot, "vmlinux-6.1.0-9-cloud-amd64"), vmlinux, 0o644); err != nil {
		t.Fatal(err)
	}
	m, err := Build(o)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(o.Out, images.KernelFile))
	if err != nil || !bytes.Equal(got, vmlinux) || m.Kernel.Release != "6.1.0-9-cloud-amd64" {
		t.Errorf("kernel of release %q with %q, %v", m.Kernel.Release, got, err)
	}
}

// The packet filter's tool is one program with several names.
func TestRootHoldsTheTool(t *testing.T) {
	o := options(t, 10)
	o.IPTables, o.IPTablesVersion = o.Engine, "1.8.9"
	m, err := Build(o)
	if err != nil || m.CreatedFrom["iptables"] != "1.8.9" {
		t.Fatalf("made from %v, %v", m, err)
	}
	entries, err := Root(o, "6.1.0-9-cloud-amd64")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, e := range entries {
		found[e.Name] = true
	}
	for _, name := range []string{"iptables", "iptables-save", "iptables-restore", "ip6tables-save", "ip6tables-restore", "kata-modprobe"} {
		if !found["usr/bin/"+name] {
			t.Errorf("no /usr/bin/%s", name)
		}
	}
}

func TestBuildBoundsTheRoot(t *testing.T) {
	_, err := Build(options(t, MaxRoot))
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("init (%d)", MaxRoot)) {
		t.Errorf("got %v; want the limit and the largest files", err)
	}
}

func TestBuildNamesTheMissingPiece(t *testing.T) {
	for want, spoil := range map[string]func(*Options){
		"agent":           func(o *Options) { o.Agent = "/nowhere/agent" },
		"OCI engine":      func(o *Options) { o.Engine = "/nowhere/crun" },
		"iptables":        func(o *Options) { o.IPTables = "/nowhere/iptables" },
		"holds 0 kernels": func(o *Options) { o.KernelPackage = "/nowhere" },
		"gone is neither": func(o *Options) { o.Modules = []modules.Want{{Group: modules.Boot, Name: "gone"}} },
	} {
		o := options(t, 10)
		spoil(&o)
		if _, err := Build(o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v; want %q", err, want)
		}
	}
}
