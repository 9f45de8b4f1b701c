// SPDX-License-Identifier: Apache-2.0

package config

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write docs/configuration.md and docs/configuration.toml")

// isolate keeps the host's own configuration out of a test.
func isolate(t *testing.T, paths ...string) {
	t.Helper()
	t.Setenv(EnvFile, "")
	old := searchPaths
	searchPaths = paths
	t.Cleanup(func() { searchPaths = old })
}

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func body(t *testing.T, text string) (*Config, []Warning) {
	t.Helper()
	c, w, err := Load(LoadOptions{Body: []byte(text)})
	if err != nil {
		t.Fatal(err)
	}
	return c, w
}

func TestDefaults(t *testing.T) {
	isolate(t)
	c, w, err := Load(LoadOptions{})
	if err != nil || len(w) != 0 {
		t.Fatalf("Load = %v, %v", w, err)
	}
	if c.QEMU.Accelerator != "kvm" || c.QEMU.Vsock != "auto" || !c.QEMU.Rootless || c.QEMU.DefaultMemory != 256 ||
		c.Agent.DialTimeout != 45*time.Second || c.Runtime.CreateContainerTimeout != time.Minute ||
		c.Runtime.StateDir != "/run/kata-containers" || c.Runtime.DisableGuestSeccomp {
		t.Errorf("unexpected defaults: %+v", c)
	}
	if c.Path() != "" || c.Origin("runtime.state_dir") != "built-in default" {
		t.Errorf("Path %q, Origin %q", c.Path(), c.Origin("runtime.state_dir"))
	}
}

// The generated sample, with every line uncommented, is the default.
func TestSampleIsTheDefault(t *testing.T) {
	isolate(t)
	var lines []string
	for l := range strings.SplitSeq(DefaultTOML(), "\n") {
		if strings.HasPrefix(l, "#") && !strings.HasPrefix(l, "# ") {
			l = l[1:]
		}
		lines = append(lines, l)
	}
	c, w := body(t, strings.Join(lines, "\n"))
	if len(w) != 0 {
		t.Errorf("warnings %v", w)
	}
	d := defaults()
	if c.QEMU.Image != "" || len(c.origin) != len(d.Settings()) {
		t.Errorf("%d keys set, want %d", len(c.origin), len(d.Settings()))
	}
	c.origin, d.origin = nil, nil
	if !reflect.DeepEqual(c, d) {
		t.Errorf("sample\n%+v\ndefaults\n%+v", c, d)
	}
}

func TestDocsAreCurrent(t *testing.T) {
	for name, want := range map[string]string{"configuration.md": Markdown(), "configuration.toml": DefaultTOML()} {
		path := filepath.Join("..", "..", "docs", name)
		if *update {
			write(t, path, want)
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != want {
			t.Errorf("docs/%s is not what the schema says; run: go generate ./internal/config", name)
		}
	}
}

func TestSourcesInOrder(t *testing.T) {
	dir := t.TempDir()
	etc := write(t, dir+"/etc/configuration.toml", "[hypervisor.qemu]\ndefault_memory = 301\n")
	usr := write(t, dir+"/usr/configuration.toml", "[hypervisor.qemu]\ndefault_memory = 302\n")
	env := write(t, dir+"/env.toml", "[hypervisor.qemu]\ndefault_memory = 303\n")
	opt := write(t, dir+"/opt/c.toml", "[hypervisor.qemu]\ndefault_memory = 304\ndefault_vcpus = 2\n")
	write(t, dir+"/opt/config.d/10.toml", "[hypervisor.qemu]\ndefault_memory = 305\n")
	write(t, dir+"/opt/config.d/20.toml", "hypervisor.qemu.default_memory = 306\n")
	write(t, dir+"/opt/config.d/30.conf", "not toml")

	memory := func(o LoadOptions, want int, origin string) *Config {
		t.Helper()
		c, _, err := Load(o)
		if err != nil {
			t.Fatal(err)
		}
		if c.QEMU.DefaultMemory != want || c.Origin("hypervisor.qemu.default_memory") != origin {
			t.Errorf("memory %d from %s, want %d from %s", c.QEMU.DefaultMemory, c.Origin("hypervisor.qemu.default_memory"), want, origin)
		}
		return c
	}
	isolate(t, dir+"/none.toml", usr)
	memory(LoadOptions{}, 302, usr+":2")
	isolate(t, etc, usr)
	memory(LoadOptions{}, 301, etc+":2")
	t.Setenv(EnvFile, env)
	memory(LoadOptions{}, 303, env+":2")
	c := memory(LoadOptions{Path: opt}, 306, dir+"/opt/config.d/20.toml:1")
	if c.QEMU.DefaultVCPUs != 2 || len(c.Files()) != 3 || c.Path() != opt {
		t.Errorf("vcpus %d files %v", c.QEMU.DefaultVCPUs, c.Files())
	}
	memory(LoadOptions{Path: opt, Body: []byte("[hypervisor]\nqemu = { default_memory = 307 }")}, 307, "config_body:2")
	memory(LoadOptions{Path: opt, Body: []byte{}}, 256, "built-in default")
	memory(LoadOptions{Path: opt, Annotations: map[string]string{}}, 306, dir+"/opt/config.d/20.toml:1")

	if _, _, err := Load(LoadOptions{Path: dir + "/none.toml"}); err == nil || !strings.Contains(err.Error(), "ConfigPath") {
		t.Errorf("missing ConfigPath: %v", err)
	}
	t.Setenv(EnvFile, dir+"/none.toml")
	if _, _, err := Load(LoadOptions{}); err == nil || !strings.Contains(err.Error(), EnvFile) {
		t.Errorf("missing %s: %v", EnvFile, err)
	}
}

func TestValues(t *testing.T) {
	c, _ := body(t, `
[hypervisor.qemu]
default_memory = 0x4_00
virtio_fs_extra_args = ["--a", '--b']
rootless = false
image = "/img"
[agent.kata]
dial_timeout = 7
kernel_modules = []
[runtime]
enable_debug = true
`)
	if c.QEMU.DefaultMemory != 1024 || !slices.Equal(c.QEMU.VirtioFSExtraArgs, []string{"--a", "--b"}) || c.QEMU.Rootless ||
		c.Agent.DialTimeout != 7*time.Second || !c.Runtime.EnableDebug {
		t.Errorf("%+v", c)
	}
	if c.QEMU.Initrd != "" {
		t.Errorf("initrd = %q beside an image", c.QEMU.Initrd)
	}
	if c.QEMU.MemoryBytes() != 1<<30 {
		t.Errorf("MemoryBytes = %d", c.QEMU.MemoryBytes())
	}
	for _, x := range []struct{ v, m, boot, most int }{{1, 0, 1, 4}, {0, 0, 1, 4}, {-1, 0, 4, 4}, {8, 0, 8, 8}, {2, 3, 2, 3}} {
		q := QEMU{DefaultVCPUs: x.v, DefaultMaxVCPUs: x.m}
		if b, m := q.CPUs(4); b != x.boot || m != x.most {
			t.Errorf("CPUs of %d/%d on 4 = %d, %d", x.v, x.m, b, m)
		}
	}
}

// Every mistake names file, line, key and what is right.
func TestErrors(t *testing.T) {
	q := "[hypervisor.qemu]\n"
	for _, x := range []struct{ text, want string }{
		{q + "defualt_memory = 1", "config_body:2: unknown key defualt_memory in [hypervisor.qemu]; the nearest key is default_memory"},
		{"[runtime]\ndefault_memory = 256", "config_body:2: unknown key default_memory in [runtime]; it belongs in [hypervisor.qemu]"},
		{"default_memory = 256", "config_body:1: unknown key default_memory: it stands in no section"},
		{"[hypervisor]\npath = \"/q\"", "config_body:2: unknown key path in [hypervisor]; it belongs in [hypervisor.qemu]"},
		{"[hypervisor]\nzzz = 1", "unknown key zzz in [hypervisor], which holds only tables"},
		{"\n[hypervisor.qmeu]", "config_body:2: [hypervisor.qmeu] is not supported"},
		{"[hypervisor.clh]\npath = 1", "config_body:1: [hypervisor.clh] is not supported; the hypervisor of this build is [hypervisor.qemu]"},
		{"[runtme]", "config_body:1: unknown section [runtme]; the nearest is [runtime]"},
		{q + "default_memory = \"big\"", "config_body:2: default_memory is a whole number from 64 to 16777216, not \"big\""},
		{q + "default_memory = 63", "config_body:2: default_memory is a whole number from 64"},
		{q + "default_memory = 1.5", "not a float"},
		{q + "default_memory = 99999999999999999999", "not a number beyond 64 bits"},
		{q + "default_memory = 1979-05-27", "not a localdate"},
		{q + "rootless = 1", "config_body:2: rootless is true or false, not 1"},
		{q + "accelerator = \"KVM\"", `accelerator is one of "kvm", "tcg", "auto", not "KVM"`},
		{q + "kernel = \"vmlinux\"", "kernel is an absolute path, not \"vmlinux\""},
		{q + "kernel = \"\"", "config_body:2: [hypervisor.qemu] kernel must name"},
		{q + "virtio_fs_extra_args = \"-o x\"", "virtio_fs_extra_args is an array of strings"},
		{q + "virtio_fs_extra_args = [1]", "not an array with an integer"},
		{q + "kernel = { a = 1 }", "config_body:2: unknown section [hypervisor.qemu.kernel]"},
		{q + "kernel_params = \"\"\"a\nb\"\"\"", "kernel_params is a string, not \"a\\nb\""},
		{q + "rootless = true\nrootless = true", "config_body:3: rootless is set a second time; it was set in line 2"},
		{q + "image = \"/a\"\ninitrd = \"/b\"", "config_body:2: [hypervisor.qemu] image excludes initrd, which is set in config_body:3"},
		{q + "initrd = \"\"", "config_body:2: [hypervisor.qemu] initrd is empty and so is image"},
		{q + "default_vcpus = 4\ndefault_maxvcpus = 2", "config_body:3: [hypervisor.qemu] default_maxvcpus is 2, less than default_vcpus = 4"},
		{q + "enable_annotations = [\"(\"]", "config_body:2: [hypervisor.qemu] enable_annotations holds \"(\""},
		{q + "valid_hypervisor_paths = [\"[\"]", "config_body:2: [hypervisor.qemu] valid_hypervisor_paths holds"},
		{q + "confidential_guest = true", "config_body:2: confidential_guest = true is refused: a confidential guest is not implemented; leave it out or set it to false"},
		{q + "pflashes = [\"/a\"]", "pflashes = [\"/a\"] is refused"},
		{"[agent.kata]\ndial_timeout = 0", "config_body:2: dial_timeout is a whole number of seconds from 1 to 3600, not 0"},
		{"[runtime]\ndisable_new_netns = true", "config_body:2: [runtime] disable_new_netns needs internetworking_model"},
		{"[runtime]\nexperimental = [\"x\"]", "config_body:2: [runtime] experimental names \"x\""},
		{"[runtime]\nsandbox_bind_mounts = [\"x\"]", "config_body:2: [runtime] sandbox_bind_mounts holds \"x\""},
		{"[runtime", "config_body:1: not valid TOML"},
		{"\n\n[runtime]\nenable_debug = ", "config_body:4: not valid TOML"},
		{"\n[runtime]\nenable_debug = tru", "config_body:3: not valid TOML"},
		{strings.Repeat("#", maxFile+1), "config_body: larger than"},
	} {
		_, _, err := Load(LoadOptions{Body: []byte(x.text)})
		if err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%.60q:\n got %v\nwant %s", x.text, err, x.want)
		}
	}
}

func TestUpstreamKeys(t *testing.T) {
	_, w := body(t, `
[hypervisor.qemu]
default_bridges = 1
confidential_guest = false
pflashes = []
[factory]
vm_cache_endpoint = "/x"
[runtime]
vfio_mode = "guest-kernel"
[[runtime.shared_mounts]]
name = "a"
[[runtime.shared_mounts]]
name = "b"
`)
	if len(w) != 1 || w[0].Line != 3 {
		t.Fatalf("warnings %v, want one at line 3", w)
	}
	for _, key := range []string{"hypervisor.qemu.default_bridges (line 3)", "factory.vm_cache_endpoint (line 7)", "runtime.vfio_mode (line 9)"} {
		if !strings.Contains(w[0].String(), key) {
			t.Errorf("%s does not name %s", w[0], key)
		}
	}
	if strings.Contains(w[0].String(), "confidential") {
		t.Errorf("%s warns about a key whose value is true here", w[0])
	}
}

// No key may be both in the schema and among those without effect.
func TestUpstreamIsDisjoint(t *testing.T) {
	for sec, keys := range upstream {
		for key := range keys {
			if lookup(sec, key) != nil {
				t.Errorf("[%s] %s is in the schema and in the table of keys without effect", sec, key)
			}
		}
	}
}

func TestAnnotations(t *testing.T) {
	const p = AnnotationPrefix
	conf := []byte(`
[hypervisor.qemu]
enable_annotations = ["default_.*", "kernel_params", "path", "kernel_modules", "virtio_fs_extra_args", "image", "initrd", "memory_slots", "confidential_guest", "rootless"]
valid_hypervisor_paths = ["/opt/*/qemu"]
kernel_params = "a=1"
`)
	load := func(a map[string]string) (*Config, []Warning, error) {
		return Load(LoadOptions{Body: conf, Annotations: a})
	}
	c, w, err := load(map[string]string{
		p + "hypervisor.default_vcpus": "2", p + "hypervisor.default_max_vcpus": "3", p + "hypervisor.kernel_params": "b=2",
		p + "hypervisor.path": "/opt/x/qemu", p + "hypervisor.virtio_fs_extra_args": `["-o","x"]`,
		p + "agent.kernel_modules": "e1000e EEE=1; i915 ", p + "hypervisor.image": "/img", p + "hypervisor.rootless": "false",
		p + "hypervisor.memory_slots": "4", p + "hypervisor.confidential_guest": "false", "io.kubernetes.cri.x": "y",
	})
	if err != nil {
		t.Fatal(err)
	}
	if c.QEMU.DefaultVCPUs != 2 || c.QEMU.DefaultMaxVCPUs != 3 || c.QEMU.KernelParams != "a=1 b=2" || c.QEMU.Path != "/opt/x/qemu" ||
		!slices.Equal(c.QEMU.VirtioFSExtraArgs, []string{"-o", "x"}) || !slices.Equal(c.Agent.KernelModules, []string{"e1000e EEE=1", "i915"}) ||
		c.QEMU.Image != "/img" || c.QEMU.Initrd != "" || c.QEMU.Rootless {
		t.Errorf("%+v", c)
	}
	if len(w) != 1 || !strings.Contains(w[0].String(), "memory_slots") {
		t.Errorf("warnings %v", w)
	}
	if o := c.Origin("hypervisor.qemu.default_vcpus"); o != "annotation "+p+"hypervisor.default_vcpus" {
		t.Errorf("origin %q", o)
	}
	for _, x := range []struct{ name, value, want string }{
		{p + "hypervisor.default_vcpu", "2", "unknown; the nearest is io.katacontainers.config.hypervisor.default_vcpus"},
		{p + "hypervisor.accelerator", "tcg", "unknown"},
		{p + "hypervisor.enable_annotations", "[]", "unknown"},
		{p + "hypervizor.path", "x", "unknown; after io.katacontainers.config. come hypervisor, agent, runtime or factory"},
		{p + "hypervisor.shared_fs", "none", "not allowed here; an operator allows it by adding \"shared_fs\" to enable_annotations"},
		{p + "hypervisor.cpu_features", "x", "not allowed"},
		{p + "hypervisor.default_memory", "lots", "default_memory is a whole number from 64 to 16777216, not \"lots\""},
		{p + "hypervisor.default_memory", "1", "default_memory is a whole number from 64 to 16777216, not 1"},
		{p + "hypervisor.rootless", "yes", "rootless is true or false"},
		{p + "hypervisor.path", "/opt/qemu", "matches none of the globs in valid_hypervisor_paths"},
		{p + "hypervisor.path", "/opt/../qemu", "matches none of the globs"},
		{p + "hypervisor.virtio_fs_extra_args", "-o x", "JSON array"},
		{p + "hypervisor.confidential_guest", "true", "refused"},
		{p + "hypervisor.kernel_params", "a\nb", "kernel_params is a string"},
		{configPathAnnotation, "/x", "a pod cannot choose the configuration"},
	} {
		_, _, err := load(map[string]string{x.name: x.value})
		if err == nil || !strings.Contains(err.Error(), x.want) || !strings.Contains(err.Error(), x.name) {
			t.Errorf("%s=%q:\n got %v\nwant %s", x.name, x.value, err, x.want)
		}
	}
	if _, _, err := load(map[string]string{p + "hypervisor.image": "/a", p + "hypervisor.initrd": "/b"}); err == nil {
		t.Error("image and initrd together were accepted")
	}
}

func TestCheckFiles(t *testing.T) {
	dir := t.TempDir()
	qemu, fsd := write(t, dir+"/qemu", "x"), write(t, dir+"/virtiofsd", "x")
	for _, p := range []string{qemu, fsd} {
		if err := os.Chmod(p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	kernel, initrd := write(t, dir+"/vmlinux", "x"), write(t, dir+"/initrd", "x")
	good := fmt.Sprintf("path = %q\nkernel = %q\ninitrd = %q\nvirtio_fs_daemon = %q\n", qemu, kernel, initrd, fsd)
	c, _ := body(t, "[hypervisor.qemu]\n"+good)
	if err := c.CheckFiles(); err != nil {
		t.Fatal(err)
	}
	if c.ManifestPath() != "" {
		t.Errorf("ManifestPath = %q without one", c.ManifestPath())
	}
	manifest := write(t, dir+"/manifest.json", "{}")
	if c.ManifestPath() != manifest {
		t.Errorf("ManifestPath = %q", c.ManifestPath())
	}
	empty := write(t, dir+"/empty", "")
	for key, path := range map[string]string{"path": kernel, "kernel": dir + "/none", "initrd": dir, "virtio_fs_daemon": dir + "/none", "firmware": empty, "manifest": dir + "/none"} {
		c, _, err := Load(LoadOptions{Body: []byte("[hypervisor.qemu]\n" + good)})
		if err != nil {
			t.Fatal(err)
		}
		if err := lookup("hypervisor.qemu", key).set(c, path); err != nil {
			t.Fatal(err)
		}
		err = c.CheckFiles()
		if err == nil || !strings.HasPrefix(err.Error(), path+" (hypervisor.qemu."+key+", ") || strings.Contains(err.Error(), "\n") || strings.HasSuffix(err.Error(), "; ") {
			t.Errorf("%s = %s: %v", key, path, err)
		}
	}
	old := virtiofsdPaths
	defer func() { virtiofsdPaths = old }()
	virtiofsdPaths = []string{dir + "/none", fsd}
	c.QEMU.VirtioFSDaemon = ""
	if p, err := c.Virtiofsd(); p != fsd || err != nil {
		t.Errorf("Virtiofsd = %q, %v", p, err)
	}
	virtiofsdPaths = []string{dir + "/none", dir + "/none2"}
	if err := c.CheckFiles(); err == nil || !strings.Contains(err.Error(), "neither this nor") {
		t.Errorf("no daemon anywhere: %v", err)
	}
	c.QEMU.SharedFS = "none"
	if err := c.CheckFiles(); err != nil {
		t.Errorf("no daemon needed: %v", err)
	}
}

// Whatever the text, Load returns and does not panic.
func FuzzLoad(f *testing.F) {
	f.Add(DefaultTOML())
	f.Add("[runtime]\nenable_debug = ")
	f.Add("a.b.c = {d = [{}, 'x']}\n[[x]]\n")
	f.Fuzz(func(t *testing.T, s string) {
		if c, _, err := Load(LoadOptions{Body: []byte(s)}); (c == nil) == (err == nil) {
			t.Errorf("Load = %v, %v", c, err)
		}
	})
}

func BenchmarkLoad(b *testing.B) {
	b.Setenv(EnvFile, "")
	path := filepath.Join(b.TempDir(), "c.toml")
	text := strings.ReplaceAll(DefaultTOML(), "\n#", "\n")
	text = strings.ReplaceAll(text, "\n ", "\n# ")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, _, err := Load(LoadOptions{Path: path}); err != nil {
			b.Fatal(err)
		}
	}
}
