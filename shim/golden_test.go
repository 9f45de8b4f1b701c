// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"bytes"
	"encoding/json"
	"os"
	"testing"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/kata-v2/kata/internal/config"
)

// startCall is what one release of containerd did to start a shim, as recorded
// from the real daemon; env are the variables that it added to its own.
type startCall struct {
	Containerd string
	Options    bool // a configuration file was named (ctr run --runtime-config-path)
	Args       []string
	Env        map[string]string
	Stdin      []byte
}

// TestStartCalls: the call of every release is understood, and answered in the
// form that this release reads (table in docs/containerd.md).
func TestStartCalls(t *testing.T) {
	data, err := os.ReadFile("testdata/start.json")
	must(t, err)
	var calls []startCall
	must(t, json.Unmarshal(data, &calls))
	form := map[string]func(*testing.T, []byte) string{
		"1.6.20": bareAnswer, "1.7.35": jsonAnswer, "2.0.14": jsonAnswer, "2.1.9": jsonAnswer, "2.2.9": jsonAnswer,
		"2.3.7": protobufAnswer, "2.4.2": protobufAnswer,
	}
	seen := map[string]int{}
	for _, c := range calls {
		seen[c.Containerd]++
		t.Run(c.Containerd, func(t *testing.T) {
			for _, name := range []string{envTTRPCAddress, envGRPCAddress, envMaxVersion, "NAMESPACE"} {
				t.Setenv(name, c.Env[name])
			}
			p, err := read(t, c.Stdin, c.Args...)
			must(t, err)
			if p.Namespace != "default" || p.ID != "golden" || p.TTRPCAddress != "/run/golden/c.sock.ttrpc" || !p.Debug {
				t.Errorf("%+v", p)
			}
			o, err := loadOptions(p.Options)
			must(t, err)
			if want := map[bool]string{true: "/etc/kata-containers/configuration.toml"}[c.Options]; o.config.Path != want {
				t.Errorf("configuration %q, want %q", o.config.Path, want)
			}
			var out bytes.Buffer
			must(t, answer(p, "unix:///run/x/shim.sock", false, mountCapabilities(&config.Config{}), &out))
			if got := form[c.Containerd](t, out.Bytes()); got != "unix:///run/x/shim.sock" {
				t.Errorf("answered %q: address %q", &out, got)
			}
		})
	}
	for version := range form {
		if seen[version] != 2 {
			t.Errorf("containerd %s: %d calls, want one with options and one without", version, seen[version])
		}
	}
}

func bareAnswer(_ *testing.T, out []byte) string { return string(out) }

// jsonAnswer reads as containerd 1.7 does, which refuses versions above 2.
func jsonAnswer(t *testing.T, out []byte) string {
	var r struct {
		Version           int
		Address, Protocol string
	}
	d := json.NewDecoder(bytes.NewReader(out))
	d.DisallowUnknownFields()
	must(t, d.Decode(&r))
	if r.Version != 2 || r.Protocol != "ttrpc" {
		t.Errorf("%+v", r)
	}
	return r.Address
}

func protobufAnswer(t *testing.T, out []byte) string {
	var r bootapi.BootstrapResult
	must(t, proto.Unmarshal(out, &r))
	if r.Version != 3 || r.Protocol != "ttrpc" {
		t.Errorf("%v", &r)
	}
	var caps types.MountCapabilities
	if found, err := r.FindExtension(&caps); err != nil || !found || allowedMounts(&caps) != "erofs,format/*,mkdir/*" {
		t.Errorf("mount capabilities: %v, %v, %v; want layers of EROFS and what names them", found, err, &caps)
	}
	return r.Address
}
