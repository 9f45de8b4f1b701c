// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestLocate(t *testing.T) {
	t.Parallel()
	const uid = "1b2c3d4e_0000_4000_8000_000000000001"
	for _, c := range []struct{ path, want, unit string }{
		{"", "/kata/kata_p1", ""},
		{"/kubepods/burstable/pod" + uid + "/abc", "/kubepods/burstable/pod" + uid + "/kata_p1", ""},
		{"/default/demo", "/default/kata_p1", ""},
		{"/demo", "/kata_p1", ""},
		{"//a//b/./c/", "/a/b/kata_p1", ""},
		{"/a:b/c", "/a:b/kata_p1", ""},
		{"demo", "/kata/kata_p1", ""},
		{"some/demo", "/kata/some/kata_p1", ""},
		{
			"kubepods-burstable-pod" + uid + ".slice:cri-containerd:abc",
			"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uid + ".slice/cri-containerd-abc.scope", "cri-containerd-abc.scope",
		},
		{"system.slice:docker:abc", "/system.slice/docker-abc.scope", "docker-abc.scope"},
		{"-.slice:ctr:a-b", "/ctr-a-b.scope", "ctr-a-b.scope"},
	} {
		l, err := locate("linux.cgroupsPath", c.path, "p1")
		if err != nil || l.Path != c.want || l.Unit != c.unit || (l.Slice == "") != (c.unit == "") {
			t.Errorf("%q: %+v, %v; want %s, unit %q", c.path, l, err, c.want, c.unit)
		}
	}
}

func TestLocateParent(t *testing.T) {
	t.Parallel()
	for parent, want := range map[string]string{
		"":                        "/kata/kata_p1",
		"/kubepods/besteffort/p":  "/kubepods/besteffort/p/kata_p1",
		"/":                       "/kata_p1",
		"/kubepods.slice/a.slice": "/a.slice/cri-containerd-p1.scope",
		"kubepods-pod1.slice":     "/kubepods.slice/kubepods-pod1.slice/cri-containerd-p1.scope",
	} {
		if l, err := locateParent("linux.cgroup_parent", parent, "p1"); err != nil || l.Path != want {
			t.Errorf("%q: %+v, %v; want %s", parent, l, err, want)
		}
	}
}

// Every refusal names the field, the value and what would be right.
func TestLocateRefuses(t *testing.T) {
	t.Parallel()
	for path, word := range map[string]string{
		"/a/../../b":                            `".."`,
		"../a":                                  `".."`,
		"a/..":                                  `".."`,
		"/":                                     "below the root",
		"///":                                   "below the root",
		".":                                     "below the root",
		"/a\nb":                                 "line break",
		"/a\x00b":                               "NUL",
		":cri:abc":                              "slice is empty",
		"a.slice::abc":                          "prefix is empty",
		"a.slice:cri:":                          "name is empty",
		"a.slice:cri":                           "1 colons",
		"a.slice:cri:abc:d":                     "3 colons",
		"a.slice:cri:a/b":                       "character",
		"a b.slice:cri:abc":                     "character",
		"a:cri:abc":                             "ends in .slice",
		".slice:cri:abc":                        "ends in .slice",
		"-a.slice:cri:abc":                      "dash",
		"a-.slice:cri:abc":                      "dash",
		"a--b.slice:cri:abc":                    "dash",
		"a.slice:c:" + strings.Repeat("x", 300): "at most 255",
	} {
		_, err := locate("linux.cgroupsPath", path, "p1")
		if err == nil || !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "linux.cgroupsPath") || !strings.Contains(err.Error(), word) {
			t.Errorf("%q: %v; want a refusal with %q", path, err, word)
		}
	}
	for _, pod := range []string{"", "a/b", "a\nb"} {
		if _, err := locate("linux.cgroupsPath", "/a/b", pod); !errdefs.IsInvalidArgument(err) {
			t.Errorf("pod %q: %v", pod, err)
		}
	}
	if _, err := locateParent("linux.cgroup_parent", "/a/..", "p1"); err == nil || !strings.Contains(err.Error(), "linux.cgroup_parent") {
		t.Errorf("a parent with ..: %v", err)
	}
}

func FuzzLocate(f *testing.F) {
	f.Add("/kubepods/pod1/x", "p")
	f.Add("a-b.slice:x:y", "p")
	f.Add("../..", "p")
	f.Fuzz(func(t *testing.T, path, pod string) {
		l, err := locate("f", path, pod)
		if err == nil && (!strings.HasPrefix(l.Path, "/") || strings.Contains(l.Path+"/", "/../") || strings.HasSuffix(l.Path, "/")) {
			t.Errorf("%q, %q: %+v", path, pod, l)
		}
	})
}
