// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"fmt"
	"strings"
	"time"
)

var volumesGroup = group{
	name: "Volumes", manifest: "volumes.yaml", ready: []string{"pod/volumes=Ready"},
	checks: []item{
		{"ConfigMap", func(k *check) {
			k.same("volumes", "cat /config/key; echo; cat /config/other; echo; cat /single; echo; echo $FROM_CONFIG", "one\nfixed\nfixed\none")
		}},
		{"Secret", func(k *check) {
			k.same("volumes", "cat /secret/password; echo; stat -L -c %a /secret/password; echo $password", "one\n400\none")
		}},
		{"projected, with a service account's token", func(k *check) {
			k.same("volumes", "cat /projected/from/config; echo; cat /projected/from/secret; echo; cat /projected/labels", "one\none\nversion=\"one\"")
			if token := k.sh("volumes", "cat /projected/token"); strings.Count(token, ".") != 2 {
				k.Errorf("the token is none: %q", token)
			}
		}},
		{"ConfigMap, live update", func(k *check) {
			k.kubectl("patch", "configmap/config", "-p", `{"data":{"key":"two"}}`)
			k.becomes("volumes", "/config/key", "two")
			k.becomes("volumes", "/projected/from/config", "two")
		}},
		{"Secret, live update", func(k *check) {
			k.kubectl("patch", "secret/secret", "-p", `{"stringData":{"password":"two"}}`)
			k.becomes("volumes", "/secret/password", "two")
			k.becomes("volumes", "/projected/from/secret", "two")
		}},
	},
}

// same compares a script's output in a container.
func (k *check) same(pod, script, want string) {
	k.Helper()
	if got := k.sh(pod, script); got != want {
		k.Errorf("in %s, %s: %q, want %q", pod, script, got, want)
	}
}

// becomes waits until a file in a container has a line with the text.
func (k *check) becomes(pod, file, text string) {
	k.Helper()
	began := time.Now()
	r := k.exec(pod, nil, "timeout", "40", "sh", "-c", fmt.Sprintf("until grep -q '%s' %s; do usleep 100000; done", text, file))
	if r.Code != 0 {
		k.Fatalf("%s in %s does not become %q within 40 s; it is %q", file, pod, text, k.sh(pod, "cat "+file))
	}
	if k.row.note == "" {
		k.note("seen after %.1f s", time.Since(began).Seconds())
	}
}

var emptyDirGroup = group{
	name: "emptyDir", manifest: "emptydir.yaml", ready: []string{"pod/emptydir=Ready"},
	checks: []item{
		{"on disk, shared by two containers, group of the pod", func(k *check) {
			k.same("emptydir/reader", "cat /disk/file; stat -c %g /disk; echo more >/disk/other && id -G", "on disk\n2000\n1000 10 2000")
			k.same("emptydir/writer", "cat /disk/other", "more")
		}},
		{"in memory, of the size asked for, shared by two containers", func(k *check) {
			k.same("emptydir/reader", "cat /memory/file; df -k /memory | tail -1 | tr -s ' ' | cut -d' ' -f2", "in memory\n16384")
			if r := k.exec("emptydir/writer", nil, "dd", "if=/dev/zero", "of=/memory/big", "bs=1M", "count=32"); r.Code == 0 {
				k.Errorf("32 MiB fit into 16 MiB")
			}
			k.note("the containers see %s", k.sh("emptydir/reader", "grep ' /memory ' /proc/mounts | cut -d' ' -f3"))
		}},
	},
}

var downwardGroup = group{
	name: "Downward API", manifest: "downward.yaml", ready: []string{"pod/downward=Ready"},
	checks: []item{
		{"environment", func(k *check) {
			ip, host := k.field("pod/downward", "{.status.podIP}"), k.field("pod/downward", "{.status.hostIP}")
			k.same("downward", "echo $POD_NAME $POD_IP $HOST_IP $NODE $MEMORY $MILLICPU", "downward "+ip+" "+host+" node 67108864 500")
		}},
		{"volume, live update", func(k *check) {
			k.same("downward", `cat /info/labels; echo; grep note= /info/annotations`, "colour=\"red\"\nnote=\"first\"")
			k.kubectl("label", "--overwrite", "pod/downward", "colour=blue")
			k.becomes("downward", "/info/labels", "colour=.blue.")
		}},
	},
}
