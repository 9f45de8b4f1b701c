// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

var readOnlyGroup = group{
	name: "Read-only mounts",
	checks: []item{{"recursive: the file system mounted below is read-only too", func(k *check) {
		tree := filepath.Join(k.c.Dir, "tree")
		sub := filepath.Join(tree, "sub")
		k.ok(os.MkdirAll(sub, 0o755))
		k.ok(unix.Mount("below", sub, "tmpfs", 0, "size=1m"))
		k.Cleanup(func() { k.ok(unix.Unmount(sub, unix.MNT_DETACH)) })
		k.ok(os.WriteFile(filepath.Join(sub, "file"), []byte("below\n"), 0o644))

		text := strings.Replace(k.hostFile(manifest("readonly.yaml")), "@TREE@", tree, 1)
		path := filepath.Join(k.c.Dir, "readonly.yaml")
		k.ok(os.WriteFile(path, []byte(text), 0o600))
		k.kubectl("apply", "-f", path)
		k.Cleanup(func() { k.remove(path) })
		k.wait("pod/readonly", "condition=Ready", readyTime)

		k.same("readonly", "cat /tree/sub/file", "below")
		k.want("pod/readonly", "{.status.containerStatuses[0].volumeMounts[0].recursiveReadOnly}", "Enabled")
		for _, f := range []string{"/tree/new", "/tree/sub/new"} {
			if r := k.exec("readonly", nil, "touch", f); r.Code == 0 || !strings.Contains(r.Stderr, "Read-only file system") {
				k.Errorf("touch %s: exit status %d, %s", f, r.Code, strings.TrimSpace(r.Stderr))
			}
		}
	}}},
}

var hostUsersGroup = group{
	name: "hostUsers: false", manifest: "hostusers.yaml",
	checks: []item{{"refused or honoured, never ignored", func(k *check) {
		r, err := k.c.Kubectl(k.ctx(callTime), "wait", "--for=condition=Ready", "pod/hostusers", "--timeout=30s")
		k.ok(err)
		if r.Code == 0 {
			ids := strings.Fields(k.sh("hostusers", "cat /proc/self/uid_map"))
			if len(ids) < 3 || ids[0] == ids[1] {
				k.Fatalf("ignored: uid_map is %q", ids)
			}
			k.note("honoured: uid_map %s", strings.Join(ids, " "))
			return
		}
		k.waitEvent("hostusers", "user namespace")
	}}},
}

// waitEvent waits for an event of a pod whose message has the words.
func (k *check) waitEvent(pod, words string) {
	k.Helper()
	var messages string
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(time.Second) {
		messages = k.kubectl("get", "events", "--field-selector=type=Warning,involvedObject.name="+pod, "-o", `jsonpath={range .items[*]}{.message}{"\n"}{end}`)
		for line := range strings.Lines(messages) {
			if strings.Contains(line, words) {
				k.note("refused: %s", line)
				return
			}
		}
	}
	k.Errorf("%s does not run, and no event says why with the words %q: %s", pod, words, messages)
}
