// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/types"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

func marshal(t *testing.T, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	must(t, err)
	return b
}

func wrap(t *testing.T, url string, m proto.Message) *anypb.Any {
	t.Helper()
	return &anypb.Any{TypeUrl: url, Value: marshal(t, m)}
}

// read parses a command line with this standard input.
func read(t *testing.T, stdin []byte, args ...string) (*params, error) {
	t.Helper()
	f, err := parseFlags(args)
	must(t, err)
	return readParams(f, bytes.NewReader(stdin))
}

var startArgs = []string{"-namespace", "ns", "-id", "c1", "-address", "/run/containerd.sock", "-publish-binary", "containerd", "start"}

func TestParamsByFlags(t *testing.T) {
	t.Setenv(envTTRPCAddress, "/run/ttrpc.sock")
	wd, err := os.Getwd()
	must(t, err)
	opts := wrap(t, typeOptions, &runtimeoptions.Options{ConfigPath: "/etc/x.toml"})
	for name, stdin := range map[string][]byte{"none": nil, "options": marshal(t, opts)} {
		p, err := read(t, stdin, append([]string{"-debug"}, startArgs...)...)
		must(t, err)
		if p.Namespace != "ns" || p.ID != "c1" || p.Bundle != wd || p.TTRPCAddress != "/run/ttrpc.sock" || !p.Debug || p.Protobuf {
			t.Errorf("%s: %+v", name, p)
		}
		if (name == "options") != proto.Equal(p.Options, opts) {
			t.Errorf("%s: options %v", name, p.Options)
		}
	}
	p, err := read(t, nil, "-namespace", "ns", "-id", "c1", "-bundle", "/b", "delete")
	must(t, err)
	if p.Bundle != "/b" || p.Debug {
		t.Errorf("%+v", p)
	}
}

func TestParamsByBootstrapProtocol(t *testing.T) {
	t.Setenv(envTTRPCAddress, "/run/old.sock")
	opts := wrap(t, "types.googleapis.com/"+typeOptions, &runtimeoptions.Options{ConfigPath: "/etc/x.toml"})
	other := wrap(t, "some.other.Extension", &types.RuntimeVersion{Version: "1"})
	b := &bootapi.BootstrapParams{
		InstanceID: "c1", Namespace: "ns", ContainerdTtrpcAddress: "/run/new.sock", LogLevel: bootapi.LogLevel_LOG_LEVEL_DEBUG,
		Extensions: []*bootapi.Extension{{Value: other}, {Value: opts}},
	}
	p, err := read(t, marshal(t, b), startArgs...)
	must(t, err)
	if !p.Protobuf || p.TTRPCAddress != "/run/new.sock" || !p.Debug || !proto.Equal(p.Options, opts) {
		t.Errorf("%+v", p)
	}
	b.LogLevel, b.ContainerdTtrpcAddress, b.Extensions = bootapi.LogLevel_LOG_LEVEL_INFO, "", nil
	p, err = read(t, marshal(t, b), startArgs...)
	must(t, err)
	if p.Debug || p.TTRPCAddress != "/run/old.sock" || p.Options != nil {
		t.Errorf("%+v", p)
	}
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("broken pipe") }

func TestMalformedParams(t *testing.T) {
	for name, args := range map[string][]string{
		"namespace": {"-id", "c1", "start"}, "id": {"-namespace", "ns", "start"},
		"-id":     {"-namespace", "ns", "-id", "a/b", "start"},
		"slashes": {"-namespace", "ns", "-id", "..", "delete"},
	} {
		if p, err := read(t, nil, args...); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%q: %+v, %v; want an error that names %q", args, p, err, name)
		}
	}
	stranger := &bootapi.BootstrapParams{InstanceID: "c2", Namespace: "ns"}
	for name, stdin := range map[string][]byte{
		"junk": []byte("this is no protobuf"), "cut": marshal(t, wrap(t, typeOptions, &runtimeoptions.Options{ConfigPath: "/x"}))[:5],
		"untyped": marshal(t, &anypb.Any{Value: []byte("x")}),
	} {
		if p, err := read(t, stdin, startArgs...); err == nil || !strings.Contains(err.Error(), "standard input") {
			t.Errorf("%s: %+v, %v", name, p, err)
		}
	}
	// Parameters for another container parse as an Any of a type that is not known.
	p, err := read(t, marshal(t, stranger), startArgs...)
	if err == nil {
		_, err = loadOptions(p.Options)
	}
	if err == nil {
		t.Error("the parameters of another container are accepted")
	}
	f, err := parseFlags(startArgs)
	must(t, err)
	if _, err := readParams(f, io.LimitReader(zeros{}, maxStdin+1)); err == nil || !strings.Contains(err.Error(), "exceeds") {
		t.Errorf("too long: %v", err)
	}
	if _, err := readParams(f, failing{}); err == nil || !strings.Contains(err.Error(), "broken pipe") {
		t.Errorf("unreadable: %v", err)
	}
	if _, err := parseFlags([]string{"-no-such-flag"}); err == nil {
		t.Error("an unknown flag is accepted")
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestLoadOptions(t *testing.T) {
	runtime := &runtimeoptions.Options{TypeUrl: "x", ConfigBody: []byte("[runtime]\n")}
	for _, url := range []string{typeOptions, typeOptionsOld, "types.containerd.io/" + typeOptions} {
		runtime.ConfigPath = ""
		o, err := loadOptions(wrap(t, url, runtime))
		if err != nil || o.notes != nil || o.config.Path != "" || string(o.config.Body) != "[runtime]\n" {
			t.Errorf("%s, body: %+v, %v", url, o, err)
		}
		runtime.ConfigPath = "/etc/kata.toml"
		o, err = loadOptions(wrap(t, url, runtime))
		if err != nil || o.notes != nil || o.config.Path != "/etc/kata.toml" || o.config.Body != nil {
			t.Errorf("%s, path and body: %+v, %v; want the path", url, o, err)
		}
	}
	for _, a := range []*anypb.Any{nil, {}} {
		if o, err := loadOptions(a); err != nil || o.config.Path != "" || o.config.Body != nil || o.notes != nil {
			t.Errorf("none: %+v, %v", o, err)
		}
	}
	for name, a := range map[string]*anypb.Any{
		"unknown type": {TypeUrl: "example.com/Other"}, "malformed": {TypeUrl: typeOptions, Value: []byte{0xff}},
		"malformed runc": {TypeUrl: typeRuncOptions, Value: []byte{0xff}},
	} {
		if _, err := loadOptions(a); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "runtime options") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRuncOptions: encoded by hand, so that it is the wire that is tested: field
// numbers of containerd api/types/runc/options/oci.proto; 8 was criu_path up to 1.7.
func TestRuncOptions(t *testing.T) {
	for _, c := range []struct{ name, wire, idle string }{
		{"none", "", ""},
		{"honoured", "\x48\x01\x62\x01a\x68\x03", ""},
		{"ctr's", "\x32\x04crun\x3a\x09/run/runc\x48\x01", "binary_name, root"},
		{"all", "\x08\x01\x10\x01\x1a\x02/c\x20\x01\x28\x01\x32\x01b\x3a\x01r\x48\x01\x52\x01i\x5a\x01w",
			"binary_name, criu_image_path, criu_work_path, io_gid, io_uid, no_new_keyring, no_pivot_root, root, shim_cgroup"},
		{"of containerd 1.7", "\x42\x04criu", ""},
	} {
		o, err := loadOptions(&anypb.Any{TypeUrl: typeRuncOptions, Value: []byte(c.wire)})
		var want []string
		if c.idle != "" {
			want = []string{"runc options without effect here: " + c.idle}
		}
		if err != nil || !slices.Equal(o.notes, want) || o.config.Path != "" {
			t.Errorf("%s: %+v, %v; want %q", c.name, o, err, want)
		}
	}
}

func TestGroupOf(t *testing.T) {
	for _, c := range []struct {
		annotations map[string]string
		want        string // empty for an error
	}{
		{nil, "c1"},
		{map[string]string{"io.kubernetes.cri.sandbox-id": "pod"}, "pod"},
		{map[string]string{"io.kubernetes.cri-o.SandboxID": "pod"}, "pod"},
		{map[string]string{"io.containerd.runc.v2.group": "pod"}, "pod"},
		{map[string]string{"io.containerd.runc.v2.group": ""}, "c1"},
		{map[string]string{"io.containerd.runc.v2.group": "g", "io.kubernetes.cri.sandbox-id": "pod"}, "pod"},
		{map[string]string{"io.containerd.runc.v2.group": "../x"}, ""},
		{map[string]string{"io.containerd.runc.v2.group": ".."}, ""},
		{map[string]string{"io.kubernetes.cri.sandbox-id": "/abs"}, ""},
	} {
		got, err := groupOf(&specs.Spec{Annotations: c.annotations}, "c1")
		if got != c.want || (c.want == "") != errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %q, %v; want %q", c.annotations, got, err, c.want)
		}
	}
}

func TestReadSpec(t *testing.T) {
	dir := t.TempDir()
	if _, err := readSpec(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	must(t, os.WriteFile(filepath.Join(dir, "config.json"), []byte("{"), 0o644))
	if _, err := readSpec(dir); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "config.json") {
		t.Errorf("malformed: %v", err)
	}
}

func TestInfo(t *testing.T) {
	var out bytes.Buffer
	opts := wrap(t, typeOptions, &runtimeoptions.Options{})
	must(t, info(bytes.NewReader(marshal(t, &types.RuntimeRequest{Options: opts})), &out))
	var r types.RuntimeInfo
	must(t, proto.Unmarshal(out.Bytes(), &r))
	if r.Name != Name || r.Version.GetVersion() == "" || r.Features.GetTypeUrl() != featuresType || !proto.Equal(r.Options, opts) {
		t.Errorf("%v", &r)
	}
	if got := r.Annotations[annotationMounts]; len(r.Annotations) != 1 || got != "erofs,format/*,mkdir/*" {
		t.Errorf("annotations %v: want what containerd 2.1 to 2.3 reads of mounts", r.Annotations)
	}
	var doc features.Features
	must(t, json.Unmarshal(r.Features.Value, &doc))
	if doc.OCIVersionMin != "1.0.0" || !slices.Contains(doc.MountOptions, "rro") {
		t.Errorf("features: %+v", doc)
	}
	if slices.Contains(doc.Linux.Namespaces, "user") || *doc.Linux.MountExtensions.IDMap.Enabled {
		t.Error("user namespaces are claimed, and refused")
	}
	if err := info(strings.NewReader("junk"), io.Discard); err == nil {
		t.Error("junk is accepted")
	}
	if err := info(bytes.NewReader(marshal(t, &types.RuntimeRequest{Options: &anypb.Any{TypeUrl: "x"}})), io.Discard); err == nil {
		t.Error("unknown options are accepted")
	}
}

// containerd reads standard output and standard error as one answer.
func TestMainKeepsQuiet(t *testing.T) {
	var out, errs bytes.Buffer
	if code := Main([]string{"-v"}, strings.NewReader(""), &out, &errs); code != 0 || errs.Len() > 0 || !strings.HasPrefix(out.String(), "containerd-shim-kata-v2 ") {
		t.Errorf("-v: %d, %q, %q", code, &out, &errs)
	}
	for _, args := range [][]string{{"frobnicate"}, {}, {"-nope"}, {"start"}, {"-namespace", "ns", "-id", "x", "frobnicate"}} {
		out.Reset()
		errs.Reset()
		if code := Main(args, strings.NewReader(""), &out, &errs); code != 1 || out.Len() > 0 || !strings.HasPrefix(errs.String(), Name+": ") {
			t.Errorf("%q: %d, %q, %q", args, code, &out, &errs)
		}
	}
}
