// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kata-v2/kata/integration/lab"
)

var serviceGroup = group{
	name: "Service", manifest: "service.yaml", ready: []string{"deployment/server=Available", "pod/client=Ready"},
	checks: []item{
		{"cluster address, from a pod", func(k *check) {
			k.reachAll("client", k.field("service/server", "{.spec.clusterIP}")+":80")
		}},
		{"cluster address, from a server to all of them", func(k *check) {
			k.reachAll(k.pods("app=server")[0], k.field("service/server", "{.spec.clusterIP}")+":80")
		}},
		{"cluster address, from the node", func(k *check) { k.reachFromNode(k.field("service/server", "{.spec.clusterIP}") + ":80") }},
		{"node port, from the node", func(k *check) { k.reachFromNode(lab.HostAddress + ":30080") }},
		{"node port, from a pod", func(k *check) { k.reachAll("client", lab.HostAddress+":30080") }},
	},
}

// reachAll asks the service from a pod until each of the servers has answered:
// nobody tells when kube-proxy has written its rules, and each request picks a
// server by chance.
func (k *check) reachAll(pod, address string) {
	k.Helper()
	names := k.pods("app=server")
	script := fmt.Sprintf("while :; do n=$(timeout 3 wget -q -O - http://%s/name) && seen=\"$seen $n\"; all=yes;", address)
	for _, n := range names {
		script += fmt.Sprintf(" case \"$seen\" in *%s*) ;; *) all=no;; esac;", n)
	}
	script += " [ $all = no ] || exit 0; done"
	if r := k.exec(pod, nil, "timeout", "30", "sh", "-c", script); r.Code != 0 {
		k.Errorf("from %s, not all of %q answer at %s within 30 s: %s", pod, names, address, lastLine(r.Stderr))
	}
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[max(0, len(lines)-2)]
}

// reachFromNode is reachAll for the node itself.
func (k *check) reachFromNode(address string) {
	k.Helper()
	names := k.pods("app=server")
	var seen []string
	var last error
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); {
		name, err := k.fetch("http://" + address + "/name")
		if err != nil {
			last = err
		} else if !slices.Contains(seen, name) {
			seen = append(seen, name)
		}
		if len(seen) == len(names) {
			return
		}
	}
	k.Errorf("from the node, of %q only %q answer at %s within 30 s; last error: %v", names, seen, address, last)
}
