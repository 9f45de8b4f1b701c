// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"strings"
	"testing"
)

// Words of the shim's log lines about templates.
const (
	logTemplateMade = "template made"
	logCloned       = "cloned"
)

// newCloneBox begins a test on a containerd whose pods start as clones. The
// template is made by its first pod, which this waits for.
func newCloneBox(t *testing.T) *box {
	t.Helper()
	o := labOptions(t)
	o.Kata.Set = map[string]string{"factory.enable_template": "true"}
	b := newOwnBox(t, o)
	b.start("first", nil, "sleep", "100000")
	b.waitLog(logTemplateMade)
	b.remove("first")
	return b
}

// waitLog waits for a line of the shims that holds a word.
func (b *box) waitLog(word string) string {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	line, err := b.c.WaitLog(ctx, func(l string) bool { return strings.Contains(l, word) })
	if err != nil {
		b.Fatalf("%q: %v", word, err)
	}
	return line
}

// Two clones of one template are two guests.
func TestClones(t *testing.T) {
	b := newCloneBox(t)
	seen := map[string]string{}
	for _, id := range []string{"clone-a", "clone-b"} {
		b.start(id, nil, "sleep", "100000")
		for what, script := range map[string]string{
			"random number": "head -c 16 /dev/urandom | od -An -tx1", "uuid": "cat /proc/sys/kernel/random/uuid",
			"boot id": "cat /proc/sys/kernel/random/boot_id",
		} {
			got := b.shell(id, script)
			if got == "" || seen[what] == got {
				t.Errorf("%s has the %s %q, which another has too", id, what, got)
			}
			seen[what] = got
		}
	}
	t.Log(b.waitLog(logCloned))
}
