// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"slices"
	"strings"
	"time"
)

var deploymentGroup = group{
	name: "Deployment", manifest: "deployment.yaml", ready: []string{"deployment/deployment=Available"},
	checks: []item{
		{"rolling update", deploymentRollout},
		{"scale up and down", deploymentScale},
		{"undo", deploymentUndo},
	},
}

// rollout waits for a deployment's newest revision to be all there is.
func (k *check) rollout(name string) {
	k.Helper()
	k.kubectl("rollout", "status", "deployment/"+name, "--timeout="+readyTime.String())
}

// releases are the values of RELEASE in the deployment's pods.
func (k *check) releases() []string {
	k.Helper()
	var all []string
	for _, p := range k.pods("app=deployment") {
		all = append(all, k.sh(p, "echo $RELEASE"))
	}
	return all
}

func deploymentRollout(k *check) {
	before, began := k.pods("app=deployment"), time.Now()
	k.kubectl("set", "env", "deployment/deployment", "RELEASE=two")
	k.rollout("deployment")
	if got := k.releases(); !slices.Equal(got, []string{"two", "two"}) {
		k.Errorf("RELEASE in the pods is %q", got)
	}
	for _, p := range k.pods("app=deployment") {
		if slices.Contains(before, p) {
			k.Errorf("%s is there still", p)
		}
	}
	k.note("two pods replaced in %.1f s", time.Since(began).Seconds())
}

func deploymentScale(k *check) {
	k.kubectl("scale", "deployment/deployment", "--replicas=4")
	k.rollout("deployment")
	if got := k.pods("app=deployment"); len(got) != 4 {
		k.Errorf("%d pods after scaling to 4", len(got))
	}
	k.kubectl("scale", "deployment/deployment", "--replicas=1")
	k.wait("deployment/deployment", "jsonpath={.status.replicas}=1", callTime)
	if got := k.pods("app=deployment"); len(got) != 1 {
		k.Errorf("%d pods after scaling to 1", len(got))
	}
}

func deploymentUndo(k *check) {
	k.kubectl("rollout", "undo", "deployment/deployment")
	k.rollout("deployment")
	if got := k.releases(); !slices.Equal(got, []string{"one"}) {
		k.Errorf("RELEASE in the pods is %q", got)
	}
}

var jobGroup = group{
	name: "Job", manifest: "job.yaml",
	checks: []item{
		{"three completions, two at a time", jobCompletes},
		{"a failing container's exit code and message", jobFails},
	},
}

func jobCompletes(k *check) {
	k.wait("job/job", "condition=Complete", readyTime)
	lines := strings.Split(strings.TrimSpace(k.kubectl("logs", "-l", "batch.kubernetes.io/job-name=job")), "\n")
	slices.Sort(lines)
	if want := []string{"index 0", "index 1", "index 2"}; !slices.Equal(lines, want) {
		k.Errorf("the pods wrote %q, want %q", lines, want)
	}
}

func jobFails(k *check) {
	k.wait("job/failing", "condition=Failed", readyTime)
	const terminated = "{.items[0].status.containerStatuses[0].state.terminated"
	for path, want := range map[string]string{".exitCode}": "42", ".message}": "the reason\n", ".reason}": "Error"} {
		got := k.kubectl("get", "pods", "-l", "batch.kubernetes.io/job-name=failing", "-o", "jsonpath="+terminated+path)
		if got != want {
			k.Errorf("terminated%s = %q, want %q", path, got, want)
		}
	}
}

var cronJobGroup = group{
	name: "CronJob", manifest: "cronjob.yaml",
	checks: []item{{"runs at the next minute", func(k *check) {
		k.wait("cronjob/cronjob", "jsonpath={.status.lastSuccessfulTime}", readyTime)
		k.note("done at %s", k.field("cronjob/cronjob", "{.status.lastSuccessfulTime}"))
	}}},
}

var tenGroup = group{
	name: "Ten pods", manifest: "",
	checks: []item{{"at once", func(k *check) {
		began := time.Now()
		k.kubectl("apply", "-f", manifest("ten.yaml"))
		removed := false
		k.Cleanup(func() {
			if !removed {
				k.remove(manifest("ten.yaml"))
			}
		})
		k.rollout("ten")
		up := time.Since(began)
		// A container that had to be started again says in its last state why.
		again := k.kubectl("get", "pods", "-l", "app=ten", "-o", "jsonpath={.items[*].status.containerStatuses[*].lastState.terminated.message}")
		if again != "" {
			k.Errorf("not all started at once: %s", again)
		}
		began = time.Now()
		k.remove(manifest("ten.yaml"))
		removed = true
		k.note("all ready after %.1f s, all gone after %.1f s", up.Seconds(), time.Since(began).Seconds())
	}}},
}
