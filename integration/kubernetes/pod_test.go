// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/kata-v2/kata/integration/lab"
)

var podGroup = group{
	name: "Pod", manifest: "pod.yaml", ready: []string{"pod/pod=Ready"},
	checks: []item{
		{"runs in a machine of its own, with overhead", podMachine},
		{"the machine is in the pod's cgroup", podCgroup},
		{"init container, sidecar, environment, working directory", podContainers},
		{"address, hostname and subdomain, resolver, shared loopback", podNetwork},
	},
}

func podMachine(k *check) {
	host, guest := k.hostFile("/proc/sys/kernel/osrelease"), k.sh("pod/main", "uname -r")
	if host == guest && k.handler != lab.HandlerRunc {
		k.Errorf("the container's kernel %s is the host's", guest)
	}
	if boot := k.hostFile("/proc/sys/kernel/random/boot_id"); boot == k.sh("pod/main", "cat /proc/sys/kernel/random/boot_id") && k.handler != lab.HandlerRunc {
		k.Errorf("the container's boot is the host's")
	}
	k.want("pod/pod", "{.spec.overhead.memory}", k.field("runtimeclass/kata", "{.overhead.podFixed.memory}"))
	k.note("the guest runs %s", guest)
}

// podCgroup looks where the pod's processes on the host are: everything that the
// pod costs counts against its limits, the overhead included.
func podCgroup(k *check) {
	if k.handler == lab.HandlerRunc {
		k.note("runc has no machine")
		return
	}
	pod := "/pod" + k.field("pod/pod", "{.metadata.uid}")
	// The pid namespace is the test's own: what runs in it belongs to the cluster.
	names, err := filepath.Glob("/proc/[0-9]*/comm")
	k.ok(err)
	machines := 0
	for _, name := range names {
		if comm, err := os.ReadFile(name); err != nil || !strings.HasPrefix(string(comm), "qemu") {
			continue // another program, or one that has just ended
		}
		machines++
		if groups := k.hostFile(filepath.Join(filepath.Dir(name), "cgroup")); !strings.Contains(groups, pod) {
			k.Errorf("the VMM is not in the pod's cgroup: %s", strings.Fields(groups))
		}
	}
	if machines != 1 {
		k.Errorf("%d VMMs run for one pod", machines)
	}
}

func podContainers(k *check) {
	k.want("pod/pod", "{.status.initContainerStatuses[0].state.terminated.reason}", "Completed")
	k.want("pod/pod", "{.status.containerStatuses[*].restartCount}", "0 0")
	k.want("pod/pod", "{.status.initContainerStatuses[1].started}", "true")
	k.want("pod/pod", "{.status.initContainerStatuses[1].restartCount}", "0")
	// The sidecar had started before the container did, and goes on.
	if got := k.sh("pod/main", "pwd; cat file before; echo $GREETING; hostname"); got != "/scratch\nfrom-init\nfrom-init\nhello world\nweb" {
		k.Errorf("in the container: %q", got)
	}
}

func podNetwork(k *check) {
	ip := k.field("pod/pod", "{.status.podIP}")
	if got := k.sh("pod/main", "cat /etc/hosts"); !strings.Contains(got, ip+"\tweb.team.default.svc.cluster.local\tweb") {
		k.Errorf("/etc/hosts does not name %s: %q", ip, got)
	}
	if got := k.sh("pod/main", "cat /etc/resolv.conf"); !strings.Contains(got, "nameserver 192.0.2.53") {
		k.Errorf("/etc/resolv.conf is not the node's: %q", got)
	}
	if got := k.sh("pod/main", "ip -4 addr show dev eth0"); !strings.Contains(got, ip+"/") {
		k.Errorf("eth0 has not the pod's address %s: %q", ip, got)
	}
	if got := k.sh("pod/main", "wget -q -O - http://127.0.0.1:8080/file"); got != "from-init" {
		k.Errorf("the second container's server says %q", got)
	}
	if body := k.get("http://" + ip + ":8080/file"); body != "from-init" {
		k.Errorf("from the node, the server says %q", body)
	}
	k.note("%s", ip)
}
