// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"fmt"
	"path/filepath"
	"strings"
)

// Kind says what an entry is and so how it is undone.
type Kind string

// The kinds of version 1.
const (
	// KindProcess is killed if PID still has the start time Start.
	KindProcess Kind = "process"
	// KindLink is a network device, deleted in the namespace NetNS.
	KindLink Kind = "link"
	// KindIngress is the ingress qdisc of the device Name in NetNS, deleted with all its filters.
	KindIngress Kind = "ingress"
	// KindFilter is one tc filter (Priority, Parent) of the device Name in NetNS.
	KindFilter Kind = "filter"
	// KindQdisc is the root qdisc with the handle Parent of the device Name in NetNS.
	KindQdisc Kind = "qdisc"
	// KindCgroup is a cgroup directory, v1 or v2: members are killed, then it
	// and everything below is removed.
	KindCgroup Kind = "cgroup"
	// KindCgroupParent is a cgroup directory above those of pods: removed when it is empty, else left.
	KindCgroupParent Kind = "cgroup-parent"
	// KindMount is unmounted (detached) until nothing is mounted at Path.
	KindMount Kind = "mount"
	// KindNetNS is a network namespace bound at Path: unmounted and unlinked.
	KindNetNS Kind = "netns"
	// KindLoop is the loop device Path, detached if its file is still Backing.
	KindLoop Kind = "loop"
	// KindFile is one file, unlinked; KindSocket the same for a socket only.
	KindFile   Kind = "file"
	KindSocket Kind = "socket"
	// KindDir is a directory, removed with its content; mounts below it stop that.
	KindDir Kind = "dir"
)

// Entry is one thing to undo. Use the functions below to make one.
type Entry struct {
	Kind Kind `json:"kind"`
	// Name of a process (for people) or of a network device.
	Name string `json:"name,omitempty"`
	// PID and Start identify a process; Start is in clock ticks since boot.
	PID   int    `json:"pid,omitempty"`
	Start uint64 `json:"start,omitempty"`
	// Path of whatever lies in the file system.
	Path string `json:"path,omitempty"`
	// NetNS is the path of the network namespace, empty for the host's.
	NetNS string `json:"netns,omitempty"`
	// Backing file of a loop device.
	Backing string `json:"backing,omitempty"`
	// Priority and Parent of a tc filter; Parent is also the handle of a qdisc.
	Priority uint16 `json:"priority,omitempty"`
	Parent   uint32 `json:"parent,omitempty"`
}

// Process is a child of this process or any other live process; its start time is
// read now. Record it before it may do work.
func Process(name string, pid int) (Entry, error) {
	start, err := StartTime(pid)
	if err != nil {
		return Entry{}, err
	}
	return Entry{Kind: KindProcess, Name: name, PID: pid, Start: start}, nil
}

// Link is a network device such as a tap, in the namespace bound at netns or in
// the host's when that is empty. Do not name a namespace by /proc/<pid>: pids are
// used again.
func Link(netns, name string) Entry { return Entry{Kind: KindLink, NetNS: netns, Name: name} }

// Ingress is the ingress qdisc of a device, with all filters on it.
func Ingress(netns, link string) Entry { return Entry{Kind: KindIngress, NetNS: netns, Name: link} }

// Filter is the tc filters of one priority below parent (0xffff0000 is the
// ingress qdisc), for a device whose qdisc belongs to somebody else.
func Filter(netns, link string, parent uint32, priority uint16) Entry {
	return Entry{Kind: KindFilter, NetNS: netns, Name: link, Parent: parent, Priority: priority}
}

// Qdisc is the root qdisc of a device, if it still has this handle.
func Qdisc(netns, link string, handle uint32) Entry {
	return Entry{Kind: KindQdisc, NetNS: netns, Name: link, Parent: handle}
}

// Cgroup is a cgroup directory that the sandbox alone uses: everything in it is killed.
func Cgroup(path string) Entry { return Entry{Kind: KindCgroup, Path: path} }

// CgroupParent is a cgroup directory that was made for the sandbox's own to lie in;
// others may use it, so nothing in it is touched.
func CgroupParent(path string) Entry { return Entry{Kind: KindCgroupParent, Path: path} }

// Mount is a mount point in the host's mount namespace.
func Mount(path string) Entry { return Entry{Kind: KindMount, Path: path} }

// NetNS is a network namespace bound at path.
func NetNS(path string) Entry { return Entry{Kind: KindNetNS, Path: path} }

// Loop is a loop device and the file that it will be attached to.
func Loop(device, backing string) Entry {
	return Entry{Kind: KindLoop, Path: device, Backing: backing}
}

// File is a file, Socket a Unix socket, Dir a directory with its content. What
// lies in the ledger's own directory needs no entry.
func File(path string) Entry { return Entry{Kind: KindFile, Path: path} }

// Socket is a Unix socket in the file system.
func Socket(path string) Entry { return Entry{Kind: KindSocket, Path: path} }

// Dir is a directory with its content.
func Dir(path string) Entry { return Entry{Kind: KindDir, Path: path} }

// String names the entry for people: "process qemu (pid 12)", "link tap0 in /run/netns/x".
func (e Entry) String() string {
	s := string(e.Kind)
	if e.Name != "" {
		s += " " + e.Name
	}
	if e.PID != 0 {
		s += fmt.Sprintf(" (pid %d)", e.PID)
	}
	if e.Path != "" {
		s += " " + e.Path
	}
	if e.Backing != "" {
		s += " on " + e.Backing
	}
	if e.NetNS != "" {
		s += " in " + e.NetNS
	}
	return s
}

// check refuses entries whose undoing would hit something else.
func (e Entry) check() error {
	switch e.Kind {
	case KindProcess:
		if e.PID <= 1 || e.Start == 0 {
			return fmt.Errorf("ledger: entry %s: pid must be above 1 and the start time known", e)
		}
	case KindLink, KindIngress, KindFilter, KindQdisc:
		if e.Name == "" || e.Name == "lo" || (e.NetNS != "" && !filepath.IsAbs(e.NetNS)) {
			return fmt.Errorf("ledger: entry %s: needs a device name and an absolute namespace path", e)
		}
	default:
		// "/run" is never the sandbox's own, "/run/x" may be.
		if !filepath.IsAbs(e.Path) || filepath.Clean(e.Path) != e.Path || strings.Count(e.Path, "/") < 2 {
			return fmt.Errorf("ledger: entry %s: path must be absolute, clean and at least two levels deep", e)
		}
	}
	return nil
}
