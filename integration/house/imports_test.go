// SPDX-License-Identifier: Apache-2.0

package house

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/kata-v2/kata"

// rule forbids imports to rooms. Paths are relative to the module; "" is all of it.
type rule struct {
	rooms, except []string
	// forbid are import paths. They stand for themselves and everything below;
	// one that ends in "!" for itself only.
	forbid []string
	// allow are exceptions from forbid.
	allow []string
	// direct looks at the room's own imports only, not at what those import.
	direct bool
	why    string
}

// ours are import paths of rooms.
func ours(rooms ...string) (out []string) {
	for _, r := range rooms {
		out = append(out, module+"/"+r)
	}
	return out
}

var (
	grpc     = []string{"google.golang.org/grpc!", "google.golang.org/grpc/internal/transport"}
	observed = []string{"go.opentelemetry.io", "github.com/prometheus"}
	heavy    = []string{"regexp", "text/template", "html", "net/http", "net/url", "crypto/tls", "crypto/x509", "encoding/xml", "encoding/gob",
		"os/exec", "flag", "expvar", "runtime/pprof", "github.com/godbus", "github.com/cilium", "github.com/spf13", "go.yaml.in", "gopkg.in"}
	programs = []string{"cmd/containerd-shim-kata-v2", "cmd/kata-agent", "cmd/kata-ctl"}
)

// rules is the table of the design's rooms, as far as imports go.
var rules = []rule{
	{rooms: []string{""}, except: []string{"shim", "cmd/containerd-shim-kata-v2", "integration"},
		forbid: []string{"github.com/containerd/containerd"}, why: "only shim/ knows containerd's types"},
	{rooms: []string{"guest-agent", "cmd/kata-agent"},
		forbid: append([]string{"k8s.io", "sigs.k8s.io"}, ours("sandbox", "hypervisor", "shim")...), why: "the guest is small and knows nothing of the host"},
	{rooms: []string{"guest-agent", "cmd/kata-agent"}, forbid: grpc, why: "the guest speaks ttrpc and links no gRPC transport"},
	{rooms: []string{"guest-agent", "cmd/kata-agent"}, forbid: append(slices.Clone(heavy), ours("protocols/taskpb", "protocols/cripb", "protocols/sandboxpb")...),
		why: "without KVM every branch that the agent takes before it serves costs 15 µs, package initialisers included"},
	{rooms: []string{"shim", "sandbox", "cmd/containerd-shim-kata-v2"}, forbid: append([]string{"net/http"}, grpc...),
		why: "the shim speaks ttrpc and links no gRPC transport; messages of its own stand for containerd's services (protocols/task.proto)"},
	{rooms: programs, forbid: observed, why: "nothing that is shipped links OpenTelemetry or Prometheus"},
	{rooms: []string{"sandbox"}, forbid: ours("shim", "guest-agent"), why: "the pod does not know its door, nor the guest's code"},
	{rooms: []string{"hypervisor"}, forbid: ours("sandbox", "protocols", "shim", "guest-agent"), why: "the machine does not know what it carries"},
	{rooms: []string{"protocols"}, forbid: []string{module}, allow: ours("protocols"), why: "the wire imports nothing of ours"},
	{rooms: []string{"images"}, forbid: []string{module}, allow: ours("images", "internal"), why: "images imports internal only"},
	{rooms: []string{"internal"}, except: []string{"internal/ctl"}, forbid: []string{module}, allow: ours("internal"),
		why: "internal is below every room (internal/ctl is the logic of a program)"},
	{rooms: []string{"shim"}, forbid: ours("hypervisor/qemu", "hypervisor/vsock", "guest-agent"), direct: true, why: "the door reaches machines through sandbox/"},
	{rooms: []string{"shim", "sandbox", "hypervisor", "guest-agent", "protocols", "images", "internal", "cmd"}, forbid: ours("integration"),
		why: "tests are not product"},
}

// pkg is what "go list -json" says about a package.
type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
	Error      *struct{ Err string }
}

// below tells whether path is root or lies below it.
func below(path, root string) bool {
	return path == root || root == "" || strings.HasPrefix(path, root+"/")
}

func (r rule) covers(p pkg) bool {
	rel := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
	in := func(rooms []string) bool {
		return slices.ContainsFunc(rooms, func(room string) bool { return below(rel, room) })
	}
	return in(r.rooms) && !in(r.except)
}

func (r rule) forbidden(path string) bool {
	if slices.ContainsFunc(r.allow, func(a string) bool { return below(path, a) }) {
		return false
	}
	return slices.ContainsFunc(r.forbid, func(f string) bool {
		only, exact := strings.CutSuffix(f, "!")
		return path == only || (!exact && below(path, f))
	})
}

// violations lists every forbidden import of pkgs.
func violations(rules []rule, pkgs []pkg) (out []string) {
	for _, r := range rules {
		for _, p := range pkgs {
			if !r.covers(p) {
				continue
			}
			imports := p.Deps
			if r.direct {
				imports = p.Imports
			}
			for _, i := range imports {
				if r.forbidden(i) {
					out = append(out, fmt.Sprintf("%s imports %s: %s", p.ImportPath, i, r.why))
				}
			}
		}
	}
	return out
}

// root is the module's directory.
func root(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Dir(strings.TrimSpace(string(out)))
}

func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Imports,Deps,Error", "./...")
	cmd.Dir = root(t)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	var pkgs []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		err := d.Decode(&p)
		if errors.Is(err, io.EOF) {
			return pkgs
		}
		if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

func TestImports(t *testing.T) {
	pkgs := list(t)
	for _, p := range pkgs {
		if p.Error != nil {
			t.Errorf("%s: %s", p.ImportPath, p.Error.Err)
		}
	}
	for _, v := range violations(rules, pkgs) {
		t.Error(v)
	}
	// A room that exists and that go list does not see would pass unnoticed.
	for _, r := range rules {
		for _, room := range r.rooms {
			if !hasGo(t, filepath.Join(root(t), room)) {
				continue // not written yet
			}
			if !slices.ContainsFunc(pkgs, rule{rooms: []string{room}}.covers) {
				t.Errorf("room %q exists and go list shows no package in it", room)
			}
		}
	}
}

// hasGo tells whether there is Go code in dir or below it.
func hasGo(t *testing.T, dir string) (found bool) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err == nil && strings.HasSuffix(path, ".go") {
			found, err = true, fs.SkipAll
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// Every rule catches what it is for, and lets through what it should.
func TestRulesCatch(t *testing.T) {
	for _, x := range []struct {
		from, to string
		direct   bool
		caught   bool
	}{
		{"sandbox", "github.com/containerd/containerd/v2/pkg/shim", false, true},
		{"internal/config", "github.com/containerd/containerd/api/types", false, true},
		{"cmd/kata-ctl", "github.com/containerd/containerd/api/types", false, true},
		{"shim/task", "github.com/containerd/containerd/v2/pkg/shim", false, false},
		{"shimmer", "github.com/containerd/containerd/v2/pkg/shim", false, true},
		{"integration/lab", "github.com/containerd/containerd/v2/client", false, false},
		{"sandbox", "github.com/containerd/ttrpc", false, false},
		{"guest-agent/rpc", "k8s.io/apimachinery/pkg/util", false, true},
		{"cmd/kata-agent", module + "/sandbox/ledger", false, true},
		{"guest-agent", module + "/hypervisor", false, true},
		{"guest-agent", module + "/protocols/agentpb", false, false},
		{"guest-agent", "google.golang.org/grpc", false, true},
		{"guest-agent", "google.golang.org/grpc/internal/transport", false, true},
		{"guest-agent", "google.golang.org/grpc/codes", false, false},
		{"cmd/kata-agent", "regexp/syntax", false, true},
		{"guest-agent/rpc", module + "/protocols/taskpb", false, true},
		{"shim", "regexp", false, false},
		{"cmd/containerd-shim-kata-v2", "go.opentelemetry.io/otel/trace", false, true},
		{"cmd/kata-ctl", "github.com/prometheus/client_golang/prometheus", false, true},
		{"integration/lab", "go.opentelemetry.io/otel", false, false},
		{"sandbox/network", module + "/shim", false, true},
		{"hypervisor/qemu", module + "/sandbox", false, true},
		{"hypervisor", module + "/protocols", false, true},
		{"hypervisor/qemu", module + "/internal/tail", false, false},
		{"protocols", module + "/internal/version", false, true},
		{"protocols", module + "/protocols/agentpb", false, false},
		{"images/builder", module + "/guest-agent", false, true},
		{"internal/config", module + "/sandbox", false, true},
		{"internal/ctl", module + "/sandbox/ledger", false, false},
		{"shim", module + "/hypervisor/qemu", true, true},
		{"shim", module + "/hypervisor/qemu", false, false},
		{"sandbox", module + "/integration/lab", false, true},
	} {
		p := pkg{ImportPath: module + "/" + x.from, Deps: []string{x.to}}
		if x.direct {
			p = pkg{ImportPath: p.ImportPath, Imports: []string{x.to}}
		}
		if got := violations(rules, []pkg{p}); (len(got) > 0) != x.caught {
			t.Errorf("%s importing %s: %v, want caught=%v", x.from, x.to, got, x.caught)
		}
	}
}
