// SPDX-License-Identifier: Apache-2.0

// Package version says which build is running. The release build sets Version
// with -ldflags "-X github.com/kata-v2/kata/internal/version.Version=…".
package version

import (
	"runtime"
	"runtime/debug"
	"sync"
)

// Name is the product's name as it appears in version output.
const Name = "kata-v2"

// Version is the release, "0.1.0-dev" unless the linker set it.
var Version = "0.1.0-dev"

// Info describes a build.
type Info struct {
	// Version is the release; Commit the source revision, empty when unknown,
	// with "-dirty" appended when the tree was not clean.
	Version string `json:"version"`
	Commit  string `json:"commit,omitempty"`
	// Go is the toolchain and Arch the target, "linux/amd64".
	Go   string `json:"go"`
	Arch string `json:"arch"`
}

var get = sync.OnceValue(func() Info {
	i := Info{Version: Version, Go: runtime.Version(), Arch: runtime.GOOS + "/" + runtime.GOARCH}
	bi, ok := debug.ReadBuildInfo()
	if !ok {
		return i
	}
	dirty := false
	for _, s := range bi.Settings {
		switch s.Key {
		case "vcs.revision":
			i.Commit = s.Value
		case "vcs.modified":
			dirty = s.Value == "true"
		}
	}
	if dirty && i.Commit != "" {
		i.Commit += "-dirty"
	}
	return i
})

// Get describes this build.
func Get() Info { return get() }

// String is "<name> <version> (<commit>, <go>, <arch>)" on one line.
func (i Info) String() string {
	s := Name + " " + i.Version + " ("
	if i.Commit != "" {
		s += i.Commit + ", "
	}
	return s + i.Go + ", " + i.Arch + ")"
}
