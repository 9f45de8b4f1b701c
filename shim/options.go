// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-v2/kata/internal/config"
)

// The type URLs of runtime options, without the prefix some callers put before
// them: containerd's own message, its name up to containerd 1.5 and in clients
// built with that, and runc's.
const (
	typeOptions     = "runtimeoptions.v1.Options"
	typeOptionsOld  = "cri.runtimeoptions.v1.Options"
	typeRuncOptions = "containerd.runc.v1.Options"
)

// runtimeOptions are what the options of a container mean here.
type runtimeOptions struct {
	// config says where the configuration comes from.
	config config.LoadOptions
	// notes are for the operator.
	notes []string
}

func optionsType(a *anypb.Any) string {
	u := a.GetTypeUrl()
	return u[strings.LastIndexByte(u, '/')+1:]
}

func isOptions(a *anypb.Any) bool {
	switch optionsType(a) {
	case typeOptions, typeOptionsOld, typeRuncOptions:
		return true
	}
	return false
}

// loadOptions reads the runtime options; nil and empty ones mean nothing.
func loadOptions(a *anypb.Any) (o runtimeOptions, err error) {
	if a == nil || (a.TypeUrl == "" && len(a.Value) == 0) {
		return o, nil
	}
	t := optionsType(a)
	var m proto.Message
	switch t {
	case typeOptions, typeOptionsOld:
		m = &runtimeoptions.Options{}
	case typeRuncOptions:
		m = &runcoptions.Options{}
	default:
		return o, fmt.Errorf("runtime options of type %q: must be %s or %s: %w", a.TypeUrl, typeOptions, typeRuncOptions, errdefs.ErrInvalidArgument)
	}
	if err := proto.Unmarshal(a.Value, m); err != nil {
		return o, fmt.Errorf("runtime options (%s): %w: %w", t, err, errdefs.ErrInvalidArgument)
	}
	switch m := m.(type) {
	case *runtimeoptions.Options:
		o.config.Path = m.ConfigPath
		// The path comes first (containerd api/types/runtimeoptions/v1/api.proto).
		if len(m.ConfigBody) > 0 && m.ConfigPath == "" {
			o.config.Body = m.ConfigBody
		}
	case *runcoptions.Options:
		o.notes = idleNotes(m)
	}
	return o, nil
}

// honoured are runc's options that need no warning: the form of cgroup paths,
// which a path shows by itself, and where a pod's Task API is, which is for
// containerd and not for the shim. (shim_cgroup would not last: the shim moves
// into the pod's cgroup.)
var honoured = []protoreflect.Name{"systemd_cgroup", "task_api_address", "task_api_version"}

// idleNotes names, in one note, the options of runc that are set and mean
// nothing for a virtual machine.
func idleNotes(o *runcoptions.Options) []string {
	var idle []string
	o.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		if !slices.Contains(honoured, f.Name()) {
			idle = append(idle, string(f.Name()))
		}
		return true
	})
	if len(idle) == 0 {
		return nil
	}
	slices.Sort(idle)
	return []string{"runc options without effect here: " + strings.Join(idle, ", ")}
}

// Annotations that name a pod: those of containerd's CRI and of CRI-O, and the
// group of the runc shim (containerd cmd/containerd-shim-runc-v2/manager).
var groupAnnotations = []string{
	"io.kubernetes.cri.sandbox-id",
	"io.kubernetes.cri-o.SandboxID",
	"io.containerd.runc.v2.group",
}

// readSpec reads a bundle's specification.
func readSpec(bundle string) (*specs.Spec, error) {
	path := filepath.Join(bundle, "config.json")
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("specification: %w", missing(err))
	}
	var s specs.Spec
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, fmt.Errorf("specification %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	return &s, nil
}

// missing gives what the system says of a file that is not there its kind.
func missing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}

// groupOf is the id of the pod that a container belongs to, its own id when it
// is a pod by itself.
func groupOf(spec *specs.Spec, id string) (string, error) {
	for _, a := range groupAnnotations {
		g, ok := spec.Annotations[a]
		switch {
		case !ok || g == "":
			continue
		case g != filepath.Base(g) || g == "." || g == "..":
			return "", fmt.Errorf("annotation %s is %q: an id without slashes is needed: %w", a, g, errdefs.ErrInvalidArgument)
		}
		return g, nil
	}
	return id, nil
}
