// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"fmt"
	"strings"
	"time"

	"github.com/kata-v2/kata/integration/lab"
)

var probesGroup = group{
	name: "Probes", manifest: "probes.yaml", ready: []string{"pod/probes=Ready"},
	checks: []item{{"startup by exec, readiness by TCP, liveness by HTTP restarts", func(k *check) {
		k.want("pod/probes", "{.status.containerStatuses[0].restartCount}", "0")
		k.sh("probes", "rm /www/alive")
		k.wait("pod/probes", "jsonpath={.status.containerStatuses[0].restartCount}=1", callTime)
		k.wait("pod/probes", "condition=Ready", readyTime)
		if events := k.kubectl("get", "events", "--field-selector=involvedObject.name=probes", "-o", "jsonpath={.items[*].message}"); !strings.Contains(events, "Liveness probe failed: HTTP probe failed with statuscode: 404") {
			k.Errorf("no event of the failed probe: %s", events)
		}
		// Not the log of the one before: the kubelet may remove that as soon as the new one is
		// made, since of those that do not run it keeps the newest.
	}}},
}

var readinessGroup = group{
	name: "Probes", manifest: "readiness.yaml", ready: []string{"pod/readiness=PodScheduled"},
	checks: []item{{"readiness comes and goes", func(k *check) {
		k.wait("pod/readiness", "jsonpath={.status.phase}=Running", readyTime)
		k.want("pod/readiness", "{.status.containerStatuses[0].ready}", "false")
		k.sh("readiness", "touch /tmp/ready")
		k.wait("pod/readiness", "condition=Ready", callTime)
		k.sh("readiness", "rm /tmp/ready")
		k.wait("pod/readiness", "condition=Ready=false", callTime)
	}}},
}

var policiesGroup = group{
	name: "Restart policy", manifest: "policies.yaml",
	checks: []item{
		{"Always: what ends is started again, well or badly", func(k *check) {
			for container, code := range map[string]string{"well": "0", "badly": "7"} {
				status := `{.status.containerStatuses[?(@.name=="` + container + `")]`
				k.wait("pod/always", "jsonpath="+status+".restartCount}=1", readyTime)
				k.want("pod/always", status+".lastState.terminated.exitCode}", code)
			}
			k.wait("pod/always", "condition=Ready", readyTime)
		}},
		{"OnFailure: only what fails", func(k *check) {
			k.wait("pod/onfailure", "jsonpath={.status.phase}=Succeeded", readyTime)
			k.restarts("pod/onfailure", "0", "1")
		}},
		{"Never: nothing", func(k *check) {
			k.wait("pod/never", "jsonpath={.status.phase}=Failed", readyTime)
			k.restarts("pod/never", "0", "0")
			k.want("pod/never", `{.status.containerStatuses[?(@.name=="badly")].state.terminated.exitCode}`, "7")
		}},
	},
}

// restarts compares how often the two containers were started again.
func (k *check) restarts(pod, well, badly string) {
	k.Helper()
	k.want(pod, `{.status.containerStatuses[?(@.name=="well")].restartCount}`, well)
	k.want(pod, `{.status.containerStatuses[?(@.name=="badly")].restartCount}`, badly)
}

var oomGroup = group{
	name: "OOM", manifest: "oom.yaml",
	checks: []item{{"OOMKilled in the status, the neighbour lives", func(k *check) {
		const greedy = `{.status.containerStatuses[?(@.name=="greedy")].state.terminated`
		k.wait("pod/oom", "jsonpath="+greedy+".exitCode}=137", readyTime)
		k.want("pod/oom", greedy+".reason}", "OOMKilled")
		k.want("pod/oom", `{.status.containerStatuses[?(@.name=="modest")].restartCount}`, "0")
		k.sh("oom/modest", "true")
	}}},
}

// beyondGrace is how long after the grace period a pod may still be there.
const beyondGrace = 3 * time.Second

var graceGroup = group{
	name: "kubectl delete", manifest: "grace.yaml", ready: []string{"pod/polite=Ready", "pod/stubborn=Ready"},
	checks: []item{
		{"a pod that listens to TERM goes at once", func(k *check) {
			if d := k.deleted("polite"); d > 15*time.Second {
				k.Errorf("gone after %.1f s; the grace period of 30 s was not cut short", d.Seconds())
			}
		}},
		{"a pod that does not: grace period + 3 s", func(k *check) {
			const grace = 5 * time.Second
			if d := k.deleted("stubborn"); d > grace+beyondGrace || d < grace {
				k.Errorf("gone after %.1f s, want between 5 and 8 s", d.Seconds())
			}
		}},
	},
}

// deleted deletes a pod and tells how long that took.
func (k *check) deleted(pod string) time.Duration {
	k.Helper()
	began := time.Now()
	k.kubectl("delete", "pod", pod, "--timeout=60s")
	d := time.Since(began)
	k.note("gone after %.1f s", d.Seconds())
	return d
}

var resizeGroup = group{
	name: "In-place resize", manifest: "resize.yaml", ready: []string{"pod/resize=Ready"},
	checks: []item{
		{"limits grow without a restart, seen inside", func(k *check) {
			if got := k.limits("resize"); got != "67108864 20000" {
				k.Errorf("at the start, memory and CPU limit inside are %q", got)
			}
			k.resize("128Mi", "500m", "134217728 50000")
		}},
		{"limits shrink without a restart, seen inside", func(k *check) { k.resize("48Mi", "100m", "50331648 10000") }},
	},
}

// resize sets the container's limits and waits until its status has them; inside
// is what the container then sees, as limits gives it.
func (k *check) resize(memory, cpu, inside string) {
	k.Helper()
	id := k.field("pod/resize", "{.status.containerStatuses[0].containerID}")
	k.kubectl("patch", "pod", "resize", "--subresource=resize", "-p",
		fmt.Sprintf(`{"spec":{"containers":[{"name":"main","resources":{"limits":{"cpu":%q,"memory":%q}}}]}}`, cpu, memory))
	k.wait("pod/resize", "jsonpath={.status.containerStatuses[0].resources.limits.memory}="+memory, callTime)
	k.wait("pod/resize", "jsonpath={.status.containerStatuses[0].resources.limits.cpu}="+cpu, callTime)
	if got := k.limits("resize"); got != inside {
		k.Errorf("after the resize, memory and CPU limit inside are %q, want %q", got, inside)
	}
	k.want("pod/resize", "{.status.containerStatuses[0].restartCount}", "0")
	k.want("pod/resize", "{.status.containerStatuses[0].containerID}", id)
}

// limits are a container's memory limit in bytes and its CPU quota in µs.
func (k *check) limits(pod string) string {
	k.Helper()
	script := "cat /sys/fs/cgroup/memory.max; cut -d' ' -f1 /sys/fs/cgroup/cpu.max"
	if k.handler == lab.HandlerRunc { // the host's cgroups may be version 1
		script = "cd /sys/fs/cgroup; cat memory.max memory/memory.limit_in_bytes 2>/dev/null; cut -d' ' -f1 cpu.max 2>/dev/null || cat cpu/cpu.cfs_quota_us"
	}
	return strings.Join(strings.Fields(k.sh(pod, script)), " ")
}
