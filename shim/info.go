// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/internal/version"
	"github.com/kata-v2/kata/sandbox"
)

// featuresType is the type URL under which containerd reads the OCI features
// document, as JSON (containerd typeurl registration of features.Features).
const featuresType = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"

// info answers "-info": the RuntimeRequest on stdin names options, which are
// checked, and the answer describes the runtime.
func info(stdin io.Reader, stdout io.Writer) error {
	in, err := io.ReadAll(io.LimitReader(stdin, maxStdin))
	if err != nil {
		return fmt.Errorf("read standard input: %w", err)
	}
	var req types.RuntimeRequest
	if err := proto.Unmarshal(in, &req); err != nil {
		return fmt.Errorf("standard input is not a RuntimeRequest: %w", err)
	}
	opts, err := loadOptions(req.Options)
	if err != nil {
		return err
	}
	doc, err := json.Marshal(ociFeatures())
	if err != nil {
		return fmt.Errorf("features: %w", err)
	}
	v := version.Get()
	out, err := proto.Marshal(&types.RuntimeInfo{
		Name:        Name,
		Version:     &types.RuntimeVersion{Version: v.Version, Revision: v.Commit},
		Options:     req.Options,
		Features:    &anypb.Any{TypeUrl: featuresType, Value: doc},
		Annotations: infoAnnotations(opts),
	})
	if err != nil {
		return err
	}
	_, err = stdout.Write(out)
	return err
}

// infoAnnotations tell a containerd that does not read it of the bootstrap's
// answer which mounts are made here. A bad configuration is start's to report.
func infoAnnotations(o runtimeOptions) map[string]string {
	c, _, err := config.Load(o.config)
	if err != nil || !sandbox.MountsBlock(c) {
		return nil
	}
	return map[string]string{annotationMounts: allowedMounts(mountCapabilities(c))}
}

// ociFeatures is the OCI features document (runtime-spec features.md). What is in
// it, a Kubernetes node offers to pods: recursive read-only mounts for the mount
// option rro, user namespaces for the namespace user with idmap mounts (containerd
// internal/cri/server/service.go). So it says what holds: with ro and rro alike, a
// directory is read-only all the way down; user namespaces are refused.
func ociFeatures() *features.Features {
	yes, no := true, false
	return &features.Features{
		OCIVersionMin: "1.0.0",
		OCIVersionMax: "1.2.0",
		MountOptions: []string{
			"async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "mand", "noatime", "nodev", "nodiratime",
			"noexec", "nomand", "norelatime", "nostrictatime", "nosuid", "private", "rbind", "relatime", "remount", "ro",
			"rprivate", "rro", "rslave", "rw", "slave", "strictatime", "suid", "sync",
		},
		Linux: &features.Linux{
			Namespaces:      []string{"cgroup", "ipc", "mount", "network", "pid", "uts"},
			Cgroup:          &features.Cgroup{V1: &no, V2: &yes, Systemd: &no, SystemdUser: &no, Rdma: &no},
			Seccomp:         &features.Seccomp{Enabled: &yes},
			Apparmor:        &features.Apparmor{Enabled: &no},
			Selinux:         &features.Selinux{Enabled: &no},
			MountExtensions: &features.MountExtensions{IDMap: &features.IDMap{Enabled: &no}},
		},
	}
}
