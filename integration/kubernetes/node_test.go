// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kata-v2/kata/integration/kubernetes/cluster"
)

var restartGroup = group{
	name: "Node", manifest: "restart.yaml", ready: []string{"deployment/steady=Available"},
	checks: []item{
		{"kubelet restart leaves the pods alone", func(k *check) {
			k.survive(func(ctx context.Context) error {
				if err := k.c.StopKubelet(); err != nil {
					return err
				}
				return k.c.StartKubelet(ctx)
			})
		}},
		{"containerd restart leaves the pods alone", func(k *check) { k.survive(k.c.Containerd.Restart) }},
		{"containerd killed and started leaves the pods alone", func(k *check) {
			k.survive(func(ctx context.Context) error {
				if err := k.c.Containerd.Kill(); err != nil {
					return err
				}
				return k.c.Containerd.Restart(ctx)
			})
		}},
	},
}

// identity is what must not change of the steady pods.
const identity = `{range .items[*]}{.metadata.uid} {.status.podIP} {.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}{"\n"}{end}`

// survive disturbs the node and looks at the steady pods: the same containers,
// not a line of their logs lost, exec works, and so does a new pod.
func (k *check) survive(disturb func(context.Context) error) {
	k.Helper()
	before := k.kubectl("get", "pods", "-l", "app=steady", "-o", "jsonpath="+identity)
	names := k.pods("app=steady")
	began := time.Now()
	k.ok(disturb(k.ctx(callTime)))
	down := time.Since(began)
	// A new pod shows that the node is all there again.
	k.kubectl("scale", "deployment/steady", "--replicas=3")
	k.rollout("steady")
	k.kubectl("scale", "deployment/steady", "--replicas=2")
	k.wait("deployment/steady", "jsonpath={.status.replicas}=2", callTime)
	for _, name := range k.pods("app=steady") {
		k.sh(name, "echo >/scratch/alive")
	}
	for _, name := range names {
		if slices.Contains(k.pods("app=steady"), name) {
			k.steadyLog(name)
		}
	}
	after := k.kubectl("get", "pods", "-l", "app=steady", "-o", "jsonpath="+identity)
	for line := range strings.Lines(before) {
		// Scaling down may have taken an older pod than the new one; the rest stays as it was.
		if uid := strings.Fields(line)[0]; strings.Contains(after, uid) && !strings.Contains(after, line) {
			k.Errorf("a pod is not what it was: %s; now %s", line, after)
		}
	}
	k.note("back after %.1f s", down.Seconds())
}

// steadyLog checks that a pod's log counts without a gap.
func (k *check) steadyLog(name string) {
	k.Helper()
	n := 0
	for line := range strings.Lines(k.kubectl("logs", name)) {
		n++
		if want := fmt.Sprintf("tick %d\n", n); line != want {
			k.Errorf("%s logs %q where %q should be", name, line, want)
			return
		}
	}
	if n < 3 {
		k.Errorf("%s has logged %d lines", name, n)
	}
}

var drainGroup = group{
	name: "Node", manifest: "restart.yaml", ready: []string{"deployment/steady=Available"},
	checks: []item{{"drain, and back in service", func(k *check) {
		began := time.Now()
		defer k.kubectl("uncordon", cluster.NodeName)
		before := k.pods("app=steady")
		k.kubectl("drain", cluster.NodeName, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=60s")
		k.note("drained in %.1f s", time.Since(began).Seconds())
		for _, p := range k.pods("app=steady") {
			if slices.Contains(before, p) {
				k.Errorf("%s is there still", p)
			}
			k.want("pod/"+p, "{.status.phase}", "Pending")
		}
		if tasks, err := k.c.Containerd.Ctr(k.ctx(callTime), "tasks", "ls", "-q"); err != nil || strings.TrimSpace(tasks.Stdout) != "" {
			k.Errorf("tasks after the drain: %q, %v", tasks.Stdout, err)
		}
		k.kubectl("uncordon", cluster.NodeName)
		k.rollout("steady")
	}}},
}
