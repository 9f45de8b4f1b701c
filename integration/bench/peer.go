// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Peer is another runtime that is measured like runc.
type Peer struct {
	// Name is the runtime's in the rows.
	Name string
	// Runtime is what containerd calls it, such as "io.containerd.runsc.v1"; its shim
	// is in the PATH.
	Runtime string
	// Binary is the program that io.containerd.runc.v2 runs in place of runc, or empty.
	Binary string
}

// runcPlugin is containerd's runtime for runc and for programs like it.
const runcPlugin = "io.containerd.runc.v2"

// peerName is what a name may be: it becomes part of a TOML key.
var peerName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)

// ParsePeer reads NAME=RUNTIME or NAME=BINARY, the absolute path of a program that
// takes runc's commands.
func ParsePeer(s string) (Peer, error) {
	name, runtime, _ := strings.Cut(s, "=")
	switch {
	case !peerName.MatchString(name) || runtime == "" || strings.ContainsAny(runtime, "\"\\\n"):
		return Peer{}, fmt.Errorf("bench: peer %q: want NAME=RUNTIME such as gvisor=io.containerd.runsc.v1, or the path of a program like runc; the name of a-z, 0-9 and -", s)
	case slices.Contains([]string{Bare, Kata, Runc}, name):
		return Peer{}, fmt.Errorf("bench: peer %q: %s is measured already; want another name", s, name)
	}
	if filepath.IsAbs(runtime) {
		return Peer{Name: name, Runtime: runcPlugin, Binary: runtime}, nil
	}
	return Peer{Name: name, Runtime: runtime}, nil
}

// runtimes are those of containers, Kata first.
func (o Options) runtimes() []string {
	out := []string{Kata, Runc}
	for _, p := range o.Peers {
		out = append(out, p.Name)
	}
	return out
}

// plugin is what containerd calls the runtime of a row.
func (o Options) plugin(runtime string) string {
	switch runtime {
	case Kata:
		return "io.containerd.kata.v2"
	case Runc:
		return runcPlugin
	}
	return o.peer(runtime).Runtime
}

// peer is the one of a name, and empty when that is none's.
func (o Options) peer(name string) Peer {
	i := slices.IndexFunc(o.Peers, func(p Peer) bool { return p.Name == name })
	if i < 0 {
		return Peer{}
	}
	return o.Peers[i]
}

// runFlags are those of `ctr run` for a runtime, with some more.
func (o Options) runFlags(runtime string, more ...string) []string {
	if b := o.peer(runtime).Binary; b != "" {
		return append([]string{"--runc-binary", b}, more...)
	}
	return more
}

// peerHandler is the CRI's name for a peer.
func peerHandler(runtime string) string { return "peer-" + runtime }

// peerHandlers are the CRI's handlers of the peers, as lines of config.toml.
func peerHandlers(o Options) string {
	cri := "io.containerd.cri.v1.runtime"
	if strings.HasPrefix(o.Version, "1.") {
		cri = "io.containerd.grpc.v1.cri"
	}
	var b strings.Builder
	for _, p := range o.Peers {
		fmt.Fprintf(&b, "[plugins.%q.containerd.runtimes.%s]\nruntime_type = %q\n", cri, peerHandler(p.Name), p.Runtime)
		if p.Binary != "" {
			fmt.Fprintf(&b, "[plugins.%q.containerd.runtimes.%s.options]\nBinaryName = %q\n", cri, peerHandler(p.Name), p.Binary)
		}
	}
	return b.String()
}
