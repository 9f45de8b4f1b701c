// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kata-v2/kata/images"
	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/sandbox/ledger"
)

// world is a host made of files below dir, on which every check is ok.
type world struct {
	t    *testing.T
	dir  string
	host host
	keys map[string]string // [hypervisor.qemu]
}

func newWorld(t *testing.T) *world {
	t.Helper()
	t.Setenv(config.EnvFile, "")
	w := &world{t: t, dir: t.TempDir()}
	for _, name := range []string{"vsock", "net", "tun"} {
		w.write(name, "")
	}
	w.program("qemu", "QEMU emulator version 7.2.9 (Debian)")
	w.program("virtiofsd", "virtiofsd 1.13.0")
	w.write("vmlinux", "kernel")
	w.write("kata-initrd.img", "initrd")
	w.manifest()
	w.host = host{
		kvm: w.path("kvm"), vhostVsock: w.path("vsock"), vhostNet: w.path("net"), tun: w.path("tun"),
		containerdConfig: w.write("containerd.toml", "# runtime_type = \"io.containerd.kata.v2\"\n  runtime_type = \"io.containerd.kata.v2\"\n"),
		lookPath:         func(n string) (string, error) { return w.path(n), nil },
	}
	w.keys = map[string]string{"path": w.path("qemu"), "virtio_fs_daemon": w.path("virtiofsd"), "kernel": w.path("vmlinux"),
		"initrd": w.path("kata-initrd.img"), "accelerator": "tcg"}
	return w
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

func (w *world) write(name, text string) string {
	w.t.Helper()
	if err := os.WriteFile(w.path(name), []byte(text), 0o644); err != nil {
		w.t.Fatal(err)
	}
	return w.path(name)
}

func (w *world) program(name, line string) {
	w.t.Helper()
	if err := os.Chmod(w.write(name, "#!/bin/sh\necho '"+line+"'\necho Copyright\n"), 0o755); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) manifest() {
	w.t.Helper()
	m := &images.Manifest{Version: "1.0", Kernel: images.Kernel{Release: "6.1.0"}}
	for _, n := range []string{"vmlinux", "kata-initrd.img"} {
		f, err := images.Describe(w.path(n))
		if err != nil {
			w.t.Fatal(err)
		}
		m.Files = append(m.Files, f)
	}
	if err := m.Write(w.path("manifest.json")); err != nil {
		w.t.Fatal(err)
	}
}

// run writes the configuration and runs the command in this process.
func (w *world) run(args ...string) (code int, stdout, stderr string) {
	w.t.Helper()
	text := "[hypervisor.qemu]\n"
	for k, v := range w.keys {
		text += fmt.Sprintf("%s = %q\n", k, v)
	}
	text += fmt.Sprintf("[runtime]\nstate_dir = %q\n", w.path("state"))
	conf := w.write("configuration.toml", text)
	var out, errs bytes.Buffer
	code = run(w.t.Context(), w.host, append([]string{"--config", conf}, args...), &out, &errs)
	return code, out.String(), errs.String()
}

// check returns the results by name.
func (w *world) check() (int, map[string]Result) {
	w.t.Helper()
	code, out, errs := w.run("check", "--json")
	var list []Result
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		w.t.Fatalf("%v in %q, stderr %q", err, out, errs)
	}
	m := map[string]Result{}
	for _, r := range list {
		m[r.Name] = r
		if (r.Status == OK) != (r.Fix == "") || r.Detail == "" {
			w.t.Errorf("%s: status %s, detail %q, fix %q", r.Name, r.Status, r.Detail, r.Fix)
		}
	}
	return code, m
}

func TestCheckAllOK(t *testing.T) {
	w := newWorld(t)
	code, m := w.check()
	for _, name := range []string{"configuration", "kvm", "vhost-vsock", "vhost-net", "tun", "qemu", "virtiofsd", "kernel", "initrd", "manifest", "shim", "containerd-runtime"} {
		if r, there := m[name]; !there || r.Status != OK {
			t.Errorf("%s: %+v", name, r)
		}
	}
	if code != 0 || len(m) != 12 {
		t.Errorf("code %d, %d results", code, len(m))
	}
	if d := m["containerd-runtime"].Detail; !strings.Contains(d, "containerd.toml:2:") {
		t.Errorf("the entry was found in %q, not in line 2", d)
	}
	code, out, _ := w.run("check")
	if code != 0 || strings.Count(out, "ok  ") != 12 || strings.Contains(out, "fix:") {
		t.Errorf("code %d, text %q", code, out)
	}
}

// Each thing that breaks is found, named, and decides the exit status.
func TestCheckFindsWhatIsBroken(t *testing.T) {
	for name, x := range map[string]struct {
		breakIt      func(w *world)
		check        string
		status, want string
	}{
		"kvm missing":    {func(w *world) { w.keys["accelerator"] = "kvm" }, "kvm", Fail, "no such file"},
		"kvm no device":  {func(w *world) { w.keys["accelerator"] = "kvm"; w.host.kvm = "/dev/null" }, "kvm", Fail, "KVM_GET_API_VERSION"},
		"kvm auto":       {func(w *world) { w.keys["accelerator"] = "auto" }, "kvm", Warn, "falls back to tcg"},
		"vsock vhost":    {func(w *world) { w.keys["vsock"] = "vhost"; w.remove("vsock") }, "vhost-vsock", Fail, "no such file"},
		"vsock auto":     {func(w *world) { w.remove("vsock") }, "vhost-vsock", OK, "vhost-user device is used"},
		"vhost-net":      {func(w *world) { w.remove("net") }, "vhost-net", Warn, "no such file"},
		"tun":            {func(w *world) { w.remove("tun") }, "tun", Fail, "no such file"},
		"qemu missing":   {func(w *world) { w.remove("qemu") }, "qemu", Fail, "hypervisor.qemu.path, set in"},
		"qemu old":       {func(w *world) { w.program("qemu", "QEMU emulator version 6.2.0") }, "qemu", Fail, "too old"},
		"qemu new":       {func(w *world) { w.program("qemu", "QEMU emulator version 10.0.2") }, "qemu", OK, "10.0.2"},
		"qemu mute":      {func(w *world) { w.program("qemu", "hello") }, "qemu", Warn, "no version number"},
		"qemu broken":    {func(w *world) { w.write("qemu", "#!/bin/false") }, "qemu", Fail, "exit status"},
		"virtiofsd":      {func(w *world) { w.remove("virtiofsd") }, "virtiofsd", Fail, "hypervisor.qemu.virtio_fs_daemon"},
		"virtiofsd none": {func(w *world) { w.keys["shared_fs"] = "none"; w.remove("virtiofsd") }, "virtiofsd", OK, "not needed"},
		"kernel":         {func(w *world) { w.remove("vmlinux") }, "kernel", Fail, "hypervisor.qemu.kernel"},
		"initrd":         {func(w *world) { w.remove("kata-initrd.img") }, "initrd", Fail, "hypervisor.qemu.initrd"},
		"digest":         {func(w *world) { w.write("vmlinux", "kernel!") }, "manifest", Fail, "does not match its manifest"},
		"manifest":       {func(w *world) { w.write("manifest.json", "{}") }, "manifest", Fail, "format"},
		"no manifest":    {func(w *world) { w.remove("manifest.json") }, "manifest", Warn, "without comparing"},
		"shim": {func(w *world) {
			w.host.lookPath = func(string) (string, error) { return "", exec.ErrNotFound }
		}, "shim", Fail, "is not in PATH"},
		"runtime entry": {func(w *world) { w.write("containerd.toml", "x = 1") }, "containerd-runtime", Warn, "no runtime of type"},
		"containerd":    {func(w *world) { w.remove("containerd.toml") }, "containerd-runtime", Warn, "no such file"},
		"configuration": {func(w *world) { w.keys["accelerator"] = "xen" }, "configuration", Fail, "accelerator is one of"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			x.breakIt(w)
			code, m := w.check()
			r := m[x.check]
			if r.Status != x.status || !strings.Contains(r.Detail, x.want) {
				t.Errorf("%+v, want %s with %q", r, x.status, x.want)
			}
			if fail := x.status == Fail; fail != (code == 1) {
				t.Errorf("exit status %d", code)
			}
		})
	}
}

func (w *world) remove(name string) {
	w.t.Helper()
	if err := os.Remove(w.path(name)); err != nil {
		w.t.Fatal(err)
	}
}

func TestCheckWarnsOfIdleKeys(t *testing.T) {
	w := newWorld(t)
	w.keys["entropy_source"] = "/dev/urandom"
	code, out, _ := w.run("check")
	if code != 0 || !strings.Contains(out, "entropy_source") {
		t.Errorf("code %d: %s", code, out)
	}
}

func TestVersionAndUsage(t *testing.T) {
	w := newWorld(t)
	if code, out, _ := w.run("version"); code != 0 || !strings.HasPrefix(out, "kata-v2 ") {
		t.Errorf("version: %d %q", code, out)
	}
	var v map[string]string
	if _, out, _ := w.run("version", "--json"); json.Unmarshal([]byte(out), &v) != nil || v["version"] == "" {
		t.Errorf("version --json: %q", out)
	}
	for _, args := range [][]string{{"chekc"}, {"ps", "x"}, {"ps", "--nope"}} {
		if code, _, errs := w.run(args...); code != 1 || !strings.HasPrefix(errs, "kata-ctl: ") {
			t.Errorf("%v: %d %q", args, code, errs)
		}
	}
}

func TestEnv(t *testing.T) {
	w := newWorld(t)
	var e Env
	code, out, errs := w.run("env", "--json")
	if err := json.Unmarshal([]byte(out), &e); err != nil || code != 0 {
		t.Fatalf("%v, code %d, %q %q", err, code, out, errs)
	}
	if e.Paths["qemu"] != w.path("qemu") || !strings.Contains(e.Versions["qemu"], "7.2.9") || e.Versions["guest_kernel"] != "6.1.0" ||
		e.Host.Kernel == "" || len(e.ConfigFiles) != 1 || len(e.Config) < 30 {
		t.Errorf("%+v", e)
	}
	_, out, _ = w.run("env")
	for _, want := range []string{"accelerator = \"tcg\"  # " + w.path("configuration.toml"), "virtio_fs_extra_args = []  # built-in default", "dial_timeout = 45"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
	w.keys["accelerator"] = "xen"
	if code, _, errs := w.run("env"); code != 1 || !strings.Contains(errs, "accelerator") {
		t.Errorf("broken configuration: %d %q", code, errs)
	}
}

// pods makes a live pod with a VMM, and a dead one with a file left over.
func (w *world) pods() (vmm *exec.Cmd, left string) {
	t, state := w.t, w.path("state")
	t.Helper()
	live, err := ledger.Create(state, ledger.Key("/b/live"), ledger.Meta{Sandbox: "live", Namespace: "k8s.io", Bundle: "/b/live", Created: time.Now().Add(-3 * time.Minute)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = live.Release() })
	vmm = exec.Command("sleep", "60")
	if err := vmm.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = vmm.Process.Kill(); _ = vmm.Wait() })
	e, err := ledger.Process("qemu", vmm.Process.Pid)
	if err == nil {
		_, err = live.Record(e)
	}
	if err != nil {
		t.Fatal(err)
	}
	dead, err := ledger.Create(state, ledger.Key("/b/dead"), ledger.Meta{Sandbox: "dead", Namespace: "default", Bundle: "/b/dead"})
	if err != nil {
		t.Fatal(err)
	}
	left = w.write("leftover", "x")
	if _, err := dead.Record(ledger.File(left)); err != nil {
		t.Fatal(err)
	}
	if err := dead.Release(); err != nil {
		t.Fatal(err)
	}
	return vmm, left
}

func TestPsAndGC(t *testing.T) {
	w := newWorld(t)
	if code, out, _ := w.run("ps", "--json"); code != 0 || strings.TrimSpace(out) != "[]" {
		t.Errorf("ps without pods: %d %q", code, out)
	}
	vmm, left := w.pods()
	var pods []Pod
	if _, out, _ := w.run("ps", "--json"); json.Unmarshal([]byte(out), &pods) != nil || len(pods) != 2 {
		t.Fatalf("ps --json: %q", out)
	}
	by := map[string]Pod{pods[0].ID: pods[0], pods[1].ID: pods[1]}
	if p := by["live"]; p.State != Running || p.VMMPID != vmm.Process.Pid || p.ShimPID != os.Getpid() || p.Namespace != "k8s.io" || p.AgeSec < 180 || p.AgeSec > 300 {
		t.Errorf("live: %+v", p)
	}
	if p := by["dead"]; p.State != Dead || p.VMMPID != 0 {
		t.Errorf("dead: %+v", p)
	}
	_, out, _ := w.run("ps")
	if lines := strings.Split(strings.TrimSpace(out), "\n"); len(lines) != 3 || !strings.Contains(out, "3m") {
		t.Errorf("ps: %q", out)
	}
	code, out, errs := w.run("gc")
	if code != 0 || !strings.Contains(out, "default/dead\n  removed file "+left) || strings.Contains(out, "live") {
		t.Errorf("gc: %d %q %q", code, out, errs)
	}
	if _, err := os.Lstat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file is still there: %v", err)
	}
	if vmm.ProcessState != nil {
		t.Error("gc touched the live pod")
	}
	if code, out, _ := w.run("gc"); code != 0 || !strings.Contains(out, "nothing to remove") {
		t.Errorf("second gc: %d %q", code, out)
	}
}

// What gc cannot remove it names, and says so with its exit status.
func TestGCReportsWhatIsLeft(t *testing.T) {
	w := newWorld(t)
	l, err := ledger.Create(w.path("elsewhere"), "0123456789abcdef", ledger.Meta{Sandbox: "p"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Record(ledger.Socket(w.write("not-a-socket", ""))); err != nil {
		t.Fatal(err)
	}
	if err := l.Release(); err != nil {
		t.Fatal(err)
	}
	// The flag decides, whatever the configuration is like.
	w.keys["accelerator"] = "xen"
	code, out, errs := w.run("gc", "--json", "--state-dir", w.path("elsewhere"))
	var list []Reaped
	if err := json.Unmarshal([]byte(out), &list); err != nil || code != 1 || len(list) != 1 || len(list[0].Left) != 1 || !strings.Contains(errs, "not a socket") {
		t.Errorf("%v, code %d, %q %q", err, code, out, errs)
	}
}

func TestAge(t *testing.T) {
	for sec, want := range map[int64]string{0: "0s", 59: "59s", 187: "3m7s", 3600*5 + 61*12: "5h12m", 86400*9 + 3*3600: "9d3h", -5: "0s"} {
		if got := age(Pod{Created: time.Unix(1, 0), AgeSec: sec}); got != want {
			t.Errorf("age of %d s = %s, want %s", sec, got, want)
		}
	}
	if got := age(Pod{}); got != "-" {
		t.Errorf("unknown age = %s", got)
	}
}
