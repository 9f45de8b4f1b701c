// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// bootID tells one boot of a kernel from every other.
func (b *box) bootID(id string) string {
	b.Helper()
	return b.shell(id, "cat /proc/sys/kernel/random/boot_id")
}

// testGroup: containers of one group share a machine and nothing else, whether
// the group is named by an annotation in a specification or by ctr, and end
// independently of each other.
func testGroup(b *box) {
	b.startSpec("one", member(b.T, "sleep", "1000"))
	b.start("two", []string{"--annotation", groupAnnotation + "=" + podID}, "sleep", "1001")
	boot := b.bootID(podID)
	for _, id := range []string{"one", "two"} {
		if got := b.bootID(id); got != boot {
			b.Errorf("%s runs in boot %s, the pod in %s", id, got, boot)
		}
	}
	if got := b.shell("one", "ps -o args"); strings.Contains(got, "1001") || strings.Contains(got, "100000") {
		b.Errorf("one container sees the processes of another: %s", got)
	}
	b.shell("two", "echo secret >/only-two")
	if r := b.exec("one", "cat", "/only-two"); r.Code == 0 {
		b.Error("one container sees another's files")
	}
	began := time.Now()
	b.remove("one")
	if took := time.Since(began); took > 5*time.Second {
		b.Errorf("the removal of one container took %v", took)
	}
	if got := b.shell("two", "cat /only-two"); got != "secret" {
		b.Errorf("the other container reads %q after the end of one", got)
	}
	b.remove("two")
	// Once more under the same id: nothing of the first is in the way.
	b.want(b.runSpec("one", script(b.T, "echo again")), 0, "again\n")
	if got := b.bootID(podID); got != boot {
		b.Errorf("the pod's machine changed")
	}
}

// testPodNamespaces: a container of a Kubernetes pod shares IPC and UTS with the
// others where its specification asks for that, by a path, and has its own where not.
func testPodNamespaces(b *box) {
	const text = "readlink /proc/self/ns/ipc; readlink /proc/self/ns/uts"
	seen := map[bool][][]string{}
	for i, shared := range []bool{true, true, false} {
		s := script(b.T, text)
		s.Annotations = map[string]string{groupAnnotation: podID, "io.kubernetes.cri.container-type": "container"}
		for j, n := range s.Linux.Namespaces {
			if shared && (n.Type == specs.IPCNamespace || n.Type == specs.UTSNamespace) {
				s.Linux.Namespaces[j].Path = "/proc/self/ns/" + string(n.Type)
			}
		}
		r := b.runSpec(fmt.Sprintf("ns%d", i), s)
		if got := strings.Fields(r.Stdout); r.Code == 0 && len(got) == 2 {
			seen[shared] = append(seen[shared], got)
		} else {
			b.Fatalf("%+v", r)
		}
	}
	for i := range 2 {
		if seen[true][0][i] != seen[true][1][i] {
			b.Errorf("containers that share have %s and %s", seen[true][0][i], seen[true][1][i])
		}
		if seen[true][0][i] == seen[false][0][i] {
			b.Errorf("one that does not share has %s as well", seen[false][0][i])
		}
	}
}
