// SPDX-License-Identifier: Apache-2.0

package modules

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// release makes a lib/modules/<release> with modules compiled here; each value is
// the module's "depends".
func release(t *testing.T, depends map[string]string, builtin ...string) string {
	t.Helper()
	root := t.TempDir()
	for name, deps := range depends {
		path := filepath.Join(root, "kernel", name+".ko")
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		src := `static const char info[] __attribute__((section(".modinfo"), used)) = "license=GPL\0depends=` + deps + `\0name=x";
int body(void) { return 1; }`
		cmd := exec.Command("gcc", "-g", "-c", "-x", "c", "-o", path, "-")
		cmd.Stdin = strings.NewReader(src)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("gcc: %v: %s", err, out)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "modules.builtin"), []byte(strings.Join(builtin, "\n")), 0o644); err != nil {
		t.Fatal(err)
	}
	return root
}

func TestPickOrdersByDependency(t *testing.T) {
	root := release(t, map[string]string{"drivers/virtio-ring": "", "drivers/virtio": "virtio_ring", "net/vsock": "", "net/transport": "virtio,vsock,unix", "fs/fs": "virtio", "net/unused": ""},
		"kernel/net/unix/unix.ko")
	picked, err := Pick(root, []Want{{Boot, "transport", "a=1 b=2"}, {FS, "fs", ""}, {Net, "unix", ""}, {Extra, "virtio-ring", ""}})
	if err != nil {
		t.Fatal(err)
	}
	want := "boot virtio_ring.ko\nboot virtio.ko\nboot vsock.ko\nboot transport.ko a=1 b=2\nfs fs.ko\n"
	if got := string(Order(picked)); got != want {
		t.Errorf("order:\n%swant:\n%s", got, want)
	}
}

func TestAliasesAreNames(t *testing.T) {
	// The source's "depends" is the place where fields can be added.
	root := release(t, map[string]string{"xt_a": `\0alias=ipt_A\0alias=ip6t_A\0alias=pci:v*d*`, "b": ""})
	picked, err := Pick(root, []Want{{Extra, "xt_a", ""}, {Extra, "b", ""}})
	if err != nil {
		t.Fatal(err)
	}
	got, err := Aliases(picked)
	if want := "ipt_A xt_a.ko\nip6t_A xt_a.ko\n"; err != nil || string(got) != want {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
	if _, err := Aliases([]Module{{File: "c.ko", Data: []byte("text")}}); err == nil || !strings.Contains(err.Error(), "c.ko") {
		t.Errorf("got %v; want the file that is no module", err)
	}
}

func TestPickUnpacksAndStrips(t *testing.T) {
	root := release(t, map[string]string{"a": ""})
	path := filepath.Join(root, "kernel", "a.ko")
	plain, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("xz", path).CombinedOutput(); err != nil {
		t.Fatalf("xz: %v: %s", err, out)
	}
	picked, err := Pick(root, []Want{{Boot, "a", ""}})
	if err != nil {
		t.Fatal(err)
	}
	if len(picked) != 1 || len(picked[0].Data) >= len(plain) || !bytes.Contains(picked[0].Data, []byte("license=GPL")) || bytes.Contains(picked[0].Data, []byte(".debug_info")) {
		t.Errorf("%d of %d bytes: want the module without debug information", len(picked[0].Data), len(plain))
	}
}

func TestPickNamesWhatIsWrong(t *testing.T) {
	root := release(t, map[string]string{"a": "b", "b": "c", "c": "a", "d": "missing"})
	for name, want := range map[string]string{"a": "depends on itself", "d": "missing is neither a module of this kernel nor built in (wanted by: d", "nowhere": "nowhere is neither"} {
		if _, err := Pick(root, []Want{{Boot, name, ""}}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v; want %q", name, err, want)
		}
	}
	if _, err := Pick(t.TempDir(), nil); err == nil || !strings.Contains(err.Error(), "lib/modules") {
		t.Errorf("got %v; want the directory refused", err)
	}
	if err := os.WriteFile(filepath.Join(root, "kernel", "text.ko"), []byte("not ELF"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Pick(root, []Want{{Boot, "text", ""}}); err == nil || !strings.Contains(err.Error(), "text.ko") {
		t.Errorf("got %v; want the file named", err)
	}
}
