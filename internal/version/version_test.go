// SPDX-License-Identifier: Apache-2.0

package version

import (
	"strings"
	"testing"
)

func TestString(t *testing.T) {
	i := Info{Version: "1.2.3", Commit: "abc-dirty", Go: "go1.26", Arch: "linux/amd64"}
	if got, want := i.String(), "kata-v2 1.2.3 (abc-dirty, go1.26, linux/amd64)"; got != want {
		t.Errorf("String() = %q, want %q", got, want)
	}
	i.Commit = ""
	if got := i.String(); strings.Contains(got, "(,") || !strings.Contains(got, "(go1.26") {
		t.Errorf("String() without a commit = %q", got)
	}
	if g := Get(); g.Version != Version || g.Arch == "" {
		t.Errorf("Get() = %+v", g)
	}
}
