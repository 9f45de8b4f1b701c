// SPDX-License-Identifier: Apache-2.0

// Package directvolume is the register of direct-assigned volumes on the host: a
// storage driver says that what is to be mounted at a path is a file system on a
// block device, which it has not mounted, and the shim gives the device to the
// machine of the pod that mounts the path.
//
// The register is files in the format of Kata Containers 4.1, so storage drivers
// work with either (its docs/design/direct-blk-device-assignment.md): below Root a
// directory for each volume, named by the base64 (URL alphabet, padded) of the
// volume's path, in it mountInfo.json, and an empty file for each sandbox that has
// the volume, named by the sandbox.
package directvolume

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Root is where the register is.
const Root = "/run/kata-containers/shared/direct-volumes"

const (
	infoFile = "mountInfo.json"
	nameMax  = 255 // of a file's name (limits.h, NAME_MAX)
)

// The service on a shim's socket that answers for the volumes of its pod.
const (
	Service      = "kata.DirectVolumes"
	MethodStats  = "Stats"  // agentpb.VolumeStatsRequest, by the path on the host
	MethodResize = "Resize" // agentpb.ResizeVolumeRequest, by the path on the host
)

// Volume types.
const (
	// TypeBlock is a block device, or a regular file as one.
	TypeBlock = "block"
)

// Keys of MountInfo.Metadata.
const (
	// KeyFSGroup is the number of the group that the volume's files are given to.
	KeyFSGroup = "fsGroup"
	// KeyFSGroupPolicy is "Always" or "OnRootMismatch".
	KeyFSGroupPolicy = "fsGroupChangePolicy"
)

// Policies of KeyFSGroupPolicy.
const (
	PolicyAlways         = "Always"
	PolicyOnRootMismatch = "OnRootMismatch"
)

// MountInfo says what to mount.
type MountInfo struct {
	// VolumeType is how Device is to be understood: TypeBlock.
	VolumeType string `json:"volume-type"`
	// Device is a path on the host.
	Device string `json:"device"`
	// FSType is the file system on the device.
	FSType string `json:"fstype"`
	// Metadata of the volume; other keys than the above are kept and mean nothing.
	Metadata map[string]string `json:"metadata,omitempty"`
	// Options of mount(8).
	Options []string `json:"options,omitempty"`
}

// Check refuses what cannot be mounted, by the name of the JSON's field.
func (m *MountInfo) Check() error {
	refuse := func(field, value, want string) error {
		return fmt.Errorf("%s %q: want %s: %w", field, value, want, errdefs.ErrInvalidArgument)
	}
	switch {
	case m.VolumeType != TypeBlock:
		return refuse("volume-type", m.VolumeType, TypeBlock)
	case !filepath.IsAbs(m.Device):
		return refuse("device", m.Device, "an absolute path")
	case m.FSType == "" || strings.ContainsAny(m.FSType, "/ ,"):
		return refuse("fstype", m.FSType, "a file system, such as ext4")
	}
	if g, ok := m.Metadata[KeyFSGroup]; ok {
		if _, err := strconv.ParseUint(g, 10, 31); err != nil {
			return refuse("metadata."+KeyFSGroup, g, "a group's number")
		}
	}
	if p := m.Metadata[KeyFSGroupPolicy]; p != "" && p != PolicyAlways && p != PolicyOnRootMismatch {
		return refuse("metadata."+KeyFSGroupPolicy, p, PolicyAlways+" or "+PolicyOnRootMismatch)
	}
	return nil
}

// Name is the volume's name in the register, and in the guest.
func Name(volume string) string { return base64.URLEncoding.EncodeToString([]byte(volume)) }

// dir is the volume's directory below root.
func dir(root, volume string) (string, error) {
	if !filepath.IsAbs(volume) {
		return "", fmt.Errorf("volume path %q: want an absolute path: %w", volume, errdefs.ErrInvalidArgument)
	}
	name := Name(volume)
	if len(name) > nameMax {
		return "", fmt.Errorf("volume path %q: want at most %d bytes: %w", volume, nameMax/4*3, errdefs.ErrInvalidArgument)
	}
	return filepath.Join(root, name), nil
}

// Parse reads a MountInfo from JSON.
func Parse(data []byte) (*MountInfo, error) {
	m := &MountInfo{}
	if err := json.Unmarshal(data, m); err != nil {
		return nil, fmt.Errorf("mount info: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if err := m.Check(); err != nil {
		return nil, fmt.Errorf("mount info: %w", err)
	}
	return m, nil
}

// Add registers a volume, or changes how a registered one is mounted from now on.
func Add(root, volume string, m *MountInfo) error {
	d, err := dir(root, volume)
	if err != nil {
		return err
	}
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(d, 0o700); err != nil {
		return err
	}
	tmp := filepath.Join(d, "."+infoFile)
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(d, infoFile))
}

// Remove takes a volume out of the register. A pod that has it keeps it.
func Remove(root, volume string) error {
	d, err := dir(root, volume)
	if err != nil {
		return err
	}
	if _, err := os.Lstat(d); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("volume %s is not registered: %w", volume, errdefs.ErrNotFound)
	}
	return os.RemoveAll(d)
}

// Load finds a volume by its path; nil means that it is not registered, or that
// root is empty.
func Load(root, volume string) (*MountInfo, error) {
	if root == "" {
		return nil, nil
	}
	d, err := dir(root, volume)
	if err != nil {
		return nil, nil //nolint:nilerr // no such path can be registered
	}
	data, err := os.ReadFile(filepath.Join(d, infoFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	m, err := Parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(d, infoFile), err)
	}
	return m, nil
}

// Use notes that a sandbox has the volume; Leave takes the note away and is idempotent.
func Use(root, volume, sandbox string) error {
	d, err := dir(root, volume)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(d, filepath.Base(sandbox)), nil, 0o600)
}

// Leave is the opposite of Use.
func Leave(root, volume, sandbox string) error {
	d, err := dir(root, volume)
	if err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(d, filepath.Base(sandbox))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Users are the sandboxes that have the volume.
func Users(root, volume string) (sandboxes []string, err error) {
	d, err := dir(root, volume)
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(d)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("volume %s is not registered: %w", volume, errdefs.ErrNotFound)
	}
	for _, e := range entries {
		if n := e.Name(); n != infoFile && n != "."+infoFile {
			sandboxes = append(sandboxes, n)
		}
	}
	return sandboxes, err
}
