// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"
)

func TestOverheadOfTheConfiguration(t *testing.T) {
	w := newWorld(t)
	code, out, errs := w.run("overhead")
	want := `# From the configuration: what a pod may come to need.
#   guest memory at boot (default_memory)   256 MiB
#   QEMU without KVM                        176 MiB
#   shim                                     16 MiB
#   virtio-fs daemon                          8 MiB
overhead:
  podFixed:
    memory: 456Mi
    cpu: 100m
`
	if code != 0 || out != want {
		t.Errorf("code %d, %s\n%s\nwant\n%s", code, errs, out, want)
	}
	w.keys["shared_fs"], w.keys["accelerator"] = "none", "kvm"
	var h Overhead
	if _, out, _ := w.run("overhead", "--json"); json.Unmarshal([]byte(out), &h) != nil || h.Memory != 320*mib || len(h.Parts) != 3 {
		t.Errorf("without a daemon, with KVM: %s; want 320 MiB of three parts", out)
	}
	// What is not there cannot be used.
	w.keys["accelerator"] = "auto"
	w.host.kvm = w.path("none")
	if _, out, _ := w.run("overhead", "--json"); json.Unmarshal([]byte(out), &h) != nil || h.Memory != 448*mib {
		t.Errorf("auto without KVM: %s; want 448 MiB", out)
	}
}

func TestOverheadOfRunningPods(t *testing.T) {
	w := newWorld(t)
	if code, _, errs := w.run("overhead", "--running"); code != 1 || !strings.Contains(errs, "no pod runs") {
		t.Errorf("without pods: code %d, %q", code, errs)
	}
	vmm, _ := w.pods()
	groups, err := runningOverhead(t.Context(), w.path("state"), 10*time.Millisecond)
	if err != nil || len(groups.Parts) != 2 || groups.Parts[0].Name != "shim" || groups.Parts[1].Name != "qemu" {
		t.Fatalf("%+v, %v; want the shim (this process) and qemu", groups, err)
	}
	if groups.Parts[0].Bytes < mib || groups.Memory%mib != 0 || groups.Memory < groups.Parts[0].Bytes+groups.Parts[1].Bytes || groups.CPUMillis < 1 {
		t.Errorf("%+v: want whole MiB that hold the parts, and some CPU", groups)
	}
	if !strings.Contains(groups.Source, "1 running pods") {
		t.Errorf("source %q: the dead pod does not count", groups.Source)
	}
	if _, err := busiest(t.Context(), [][]int{{os.Getpid(), vmm.Process.Pid}}, 0); err == nil {
		t.Error("a window of no time was accepted")
	}
	if _, err := busiest(t.Context(), [][]int{{1 << 22}}, time.Millisecond); err == nil {
		t.Error("a process that does not exist was watched")
	}
}
