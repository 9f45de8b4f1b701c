// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/sandbox/agentclient"
)

func TestTargets(t *testing.T) {
	for in, want := range map[string]target{
		"":                      {},
		"/dev/null":             {},
		"file:///dev/null":      {},
		"/run/fifo/in":          {scheme: "fifo", path: "/run/fifo/in"},
		"/odd/%zz?x=1#y":        {scheme: "fifo", path: "/odd/%zz?x=1#y"},
		"fifo:///run/in":        {scheme: "fifo", path: "/run/in"},
		"file:///var/log/x":     {scheme: "file", path: "/var/log/x"},
		"file:///x?maxsize=10":  {scheme: "file", path: "/x"},
		"binary:///bin/log":     {scheme: "binary", path: "/bin/log"},
		"binary:///dev/null":    {scheme: "binary", path: "/dev/null"},
		"binary:///l?b=1&a=%20": {scheme: "binary", path: "/l", args: []string{"b", "1", "a", " "}},
		"binary:///l?k&k=2&&z=": {scheme: "binary", path: "/l", args: []string{"k", "", "z", ""}},
	} {
		if got, err := parseTarget(in); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, %v; want %+v", in, got, err, want)
		}
	}
}

func TestRefusedTargets(t *testing.T) {
	for _, c := range []struct {
		word  string
		paths stdioPaths
	}{
		{"stdin", stdioPaths{stdin: "binary:///bin/logger"}},
		{"stdout", stdioPaths{stdout: "tcp://x"}},
		{"stderr", stdioPaths{stderr: ":bad"}},
		{"absolute", stdioPaths{stdout: "file://relative/path"}},
		{"fifo, file or binary", stdioPaths{stdout: "relative"}},
		{"absolute", stdioPaths{stdout: "binary:"}},
		{"query", stdioPaths{stdout: "binary:///l?%zz=1"}},
		{"query", stdioPaths{stdout: "binary:///l?a=%zz"}},
	} {
		err := c.paths.check()
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.word) {
			t.Errorf("%+v: %v; want an invalid argument that says %q", c.paths, err, c.word)
		}
		if w := c.paths.wants(); w != (agentclient.StdioWants{}) {
			t.Errorf("%+v wants %+v", c.paths, w)
		}
	}
}

func TestWants(t *testing.T) {
	for _, c := range []struct {
		paths stdioPaths
		want  agentclient.StdioWants
	}{
		{stdioPaths{}, agentclient.StdioWants{}},
		{stdioPaths{stdin: "/a", stdout: "file:///b", stderr: "binary:///c"}, agentclient.StdioWants{Stdin: true, Stdout: true, Stderr: true}},
		{stdioPaths{stdin: "/a", stdout: "/b", stderr: "/c", terminal: true}, agentclient.StdioWants{Stdin: true, Stdout: true}},
		{stdioPaths{stdin: "/dev/null", stdout: "file:///dev/null", stderr: "/c"}, agentclient.StdioWants{Stderr: true}},
	} {
		if got := c.paths.wants(); got != c.want {
			t.Errorf("%+v wants %+v, want %+v", c.paths, got, c.want)
		}
	}
}
