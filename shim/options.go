// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-v2/kata/internal/config"
)

// The type URLs of runtime options, without the prefix some callers put before
// them: containerd's own message, its name before containerd 2.0, and runc's.
const (
	typeOptions     = "runtimeoptions.v1.Options"
	typeOptionsOld  = "cri.runtimeoptions.v1.Options"
	typeRuncOptions = "containerd.runc.v1.Options"
)

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

// loadOptions turns the runtime options into where the configuration comes
// from. notes are for the operator.
func loadOptions(a *anypb.Any) (o config.LoadOptions, notes []string, err error) {
	if a == nil || (a.TypeUrl == "" && len(a.Value) == 0) {
		return o, nil, nil
	}
	switch t := optionsType(a); t {
	case typeOptions, typeOptionsOld:
		var ro runtimeoptions.Options
		if err := proto.Unmarshal(a.Value, &ro); err != nil {
			return o, nil, fmt.Errorf("runtime options (%s): %w: %w", t, err, errdefs.ErrInvalidArgument)
		}
		o.Path = ro.ConfigPath
		if len(ro.ConfigBody) > 0 {
			o.Body = ro.ConfigBody
		}
		return o, nil, nil
	case typeRuncOptions:
		var ro runcoptions.Options
		if err := proto.Unmarshal(a.Value, &ro); err != nil {
			return o, nil, fmt.Errorf("runtime options (%s): %w: %w", t, err, errdefs.ErrInvalidArgument)
		}
		return o, runcNotes(&ro), nil
	default:
		return o, nil, fmt.Errorf("runtime options of type %q: must be %s or %s: %w", a.TypeUrl, typeOptions, typeRuncOptions, errdefs.ErrInvalidArgument)
	}
}

// runcNotes names runc's options that are set and mean nothing for a VM.
func runcNotes(o *runcoptions.Options) []string {
	var idle []string
	for name, set := range map[string]bool{
		"no_pivot_root": o.NoPivotRoot, "no_new_keyring": o.NoNewKeyring, "binary_name": o.BinaryName != "",
		"root": o.Root != "", "criu_image_path": o.CriuImagePath != "", "criu_work_path": o.CriuWorkPath != "",
		"io_uid": o.IoUid != 0, "io_gid": o.IoGid != 0, "shim_cgroup": o.ShimCgroup != "",
	} {
		if set {
			idle = append(idle, name)
		}
	}
	if len(idle) == 0 {
		return nil
	}
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
