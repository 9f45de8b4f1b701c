// SPDX-License-Identifier: Apache-2.0

package checkpoint

import (
	"encoding/json"
	"time"

	"github.com/kata-v2/kata/sandbox/storage"
	"github.com/kata-v2/kata/sandbox/template"
)

// Manifest says what a checkpoint is.
type Manifest struct {
	Version int       `json:"version"`
	Sandbox string    `json:"sandbox"` // the pod's id
	Created time.Time `json:"created"` // when the guest stood still
	// Machine is what a machine must be like that goes on with it.
	Machine template.Key `json:"machine"`
	Memory  File         `json:"memory"`
	State   File         `json:"state"`
	// Ports is how many devices the machine has place for, disks included.
	Ports int    `json:"ports"`
	Disks []Disk `json:"disks"`
	// Interfaces and Routes are the guest's network: messages of the agent's
	// protocol in the JSON form of protobuf.
	Interfaces []json.RawMessage `json:"interfaces"`
	Routes     []json.RawMessage `json:"routes"`
	Containers []Container       `json:"containers"`
	// Synced is the highest number of a synced volume's copy in the guest.
	Synced int `json:"synced"`
}

// File is a sparse file of the checkpoint, or of the host.
type File struct {
	Bytes  int64  `json:"bytes"`
	SHA256 string `json:"sha256"` // of what is not zero, see template.CopySparse
}

// Part is a piece of a read-only disk, as hypervisor.DiskPart.
type Part struct {
	File
	// Path is the host's file; empty for a piece that the checkpoint holds itself.
	Path    string `json:"path,omitempty"`
	Sectors uint64 `json:"sectors,omitempty"`
}

// Disk is a disk of the machine.
type Disk struct {
	ID       string `json:"id"`
	Place    string `json:"place"` // in the guest, see hypervisor.Disk
	ReadOnly bool   `json:"read_only"`
	// Parts are what a read-only disk consists of.
	Parts []Part `json:"parts,omitempty"`
	// Content is what a disk that is written holds.
	Content *File `json:"content,omitempty"`
}

// Container is a container of the pod.
type Container struct {
	// Name tells which container of a restored pod goes on with it; ID is the guest's.
	Name   string `json:"name"`
	ID     string `json:"id"`
	Bundle string `json:"bundle"`
	// State is "created", "running" or "paused"; its processes are frozen in the latter two.
	State string `json:"state"`
	// PID is the first process's number in the guest, 0 if that is not known.
	PID uint32 `json:"pid"`
	// Terminal, Stdin, Stdout and Stderr are the streams that its process has.
	Terminal bool `json:"terminal"`
	Stdin    bool `json:"stdin"`
	Stdout   bool `json:"stdout"`
	Stderr   bool `json:"stderr"`
	// Disks are the IDs of those that it uses, the root filesystem's.
	Disks []string `json:"disks"`
	// Volumes are the synced ones, by the place where the container has them.
	Volumes map[string]storage.SyncedCopy `json:"volumes,omitempty"`
	// Spec is the container's specification.
	Spec json.RawMessage `json:"spec"`
}
