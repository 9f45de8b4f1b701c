// SPDX-License-Identifier: Apache-2.0

package cri

import (
	"encoding/json"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// severalNetworks gives a pod two devices: eth0 with addresses of both families,
// and what the plugin more adds, as Multus does.
const severalNetworks = `{"type": "bridge", "bridge": "lan1", "isGateway": true, "mtu": 1420, "ipam": {"type": "host-local", "dataDir": "@DATA@",
	"ranges": [[{"subnet": "10.88.79.0/24"}], [{"subnet": "2001:db8:79::/64"}]], "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
	{"type": "more", "data": "@DATA@"}`

// morePlugin has the bridge plugin make a second device, net1, with a route of its own.
const morePlugin = `#!/bin/sh
in=$(cat)
value() { printf %s "$in" | sed -n 's/.*"'$1'":"\([^"]*\)".*/\1/p'; }
net1() {
	echo '{"cniVersion": "1.0.0", "name": "'$(value name)'-more", "type": "bridge", "bridge": "lan2", "isGateway": true, "ipam": {"type": "host-local",
		"dataDir": "'$(value data)'", "ranges": [[{"subnet": "10.88.80.0/24"}]], "routes": [{"dst": "198.51.100.0/24"}]}}' |
		CNI_IFNAME=net1 ${CNI_PATH%%:*}/bridge
}
case $CNI_COMMAND in
ADD)
	net1 >/dev/null || exit 1
	printf %s "$in" | sed -n 's/.*"prevResult":\(.*\),"type":.*/\1/p' ;;
DEL) net1 ;;
VERSION) echo '{"cniVersion": "1.0.0", "supportedVersions": ["1.0.0"]}' ;;
esac
`

// pid is the pod's process on the host.
func (p *pod) pid() int {
	p.Helper()
	var info struct {
		PID int `json:"pid"`
	}
	p.ok(json.Unmarshal([]byte(must(p.runtime.PodSandboxStatus(p.ctx(), p.id, true))(p).Info["info"]), &info))
	return info.PID
}

// host runs a program in what the lab takes for the host's network and returns its output.
func (b *box) host(args ...string) string {
	b.Helper()
	var out []byte
	err := b.c.InHostNet(func() (err error) {
		out, err = exec.Command(args[0], args[1:]...).CombinedOutput()
		return err
	})
	if err != nil {
		b.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// within runs a program in the pod's network namespace on the host.
func (p *pod) within(args ...string) string {
	p.Helper()
	return p.host(append([]string{"nsenter", "--target", strconv.Itoa(p.pid()), "--net"}, args...)...)
}

// TestNetworkDevices: a pod with two devices, addresses of both families and two
// queues, limited by annotations; more devices come and go while it runs. Its
// handler passes the host's devices to privileged containers.
func TestNetworkDevices(t *testing.T) { each(t, testNetworkDevices) }

func testNetworkDevices(b *box) {
	if b.mode.version < "2" {
		return // whose labs have one network
	}
	b.mode.handler += "-several"
	const prefix = "io.katacontainers.config.hypervisor."
	p := b.run(func(c *runtimeapi.PodSandboxConfig) {
		c.Annotations = map[string]string{prefix + "default_vcpus": "2", prefix + "rx_rate_limiter_max_rate": "800000000", prefix + "tx_rate_limiter_max_rate": "400000000"}
		c.Linux.SecurityContext.Privileged = true
	})
	n := must(p.runtime.PodSandboxStatus(p.ctx(), p.id, false))(b).Status.Network
	if len(n.AdditionalIps) != 1 || !strings.HasPrefix(n.AdditionalIps[0].Ip, "2001:db8:79::") {
		b.Fatalf("the CRI knows of the addresses %v", n)
	}
	c := p.sleeper()
	if got, want := c.shell(strings.Join([]string{ // one exec for all: each has its price
		// The bridge's own address of the second family is not usable before its duplicate address detection.
		"for a in 10.88.79.1 2001:db8:79::1 10.88.80.1; do for i in 1 2 3 4 5; do ping -c 1 -W 5 $a >/dev/null && echo $a && break; done; done",
		"ls /sys/class/net | sort | xargs",
		"cat /sys/class/net/eth0/mtu /sys/class/net/net1/mtu",
		"ls -d /sys/class/net/eth0/queues/tx-* | wc -l",
		"ip -o addr show eth0 | grep -c -e " + n.Ip + "/24 -e " + n.AdditionalIps[0].Ip + "/64",
		"ip route | grep 198.51.100.0/24 | xargs",
	}, "\n")), "10.88.79.1\n2001:db8:79::1\n10.88.80.1\neth0 lo net1\n1420\n1500\n2\n2\n198.51.100.0/24 via 10.88.80.1 dev net1"; got != want {
		b.Errorf("the guest has %q; want %q", got, want)
	}
	if got := p.within("tc", "qdisc"); strings.Count(got, "rate 800Mbit") != 2 || strings.Count(got, "rate 400Mbit") != 2 {
		b.Errorf("limits of two devices: %s", got)
	}
	testLateDevices(p, c)

	const disks = "ls /sys/class/block"
	before := c.shell(disks)
	privileged := func(s *runtimeapi.LinuxContainerSecurityContext) { s.Privileged = true }
	if got := p.output(p.secure("find /dev -type b; test -c /dev/full && echo full", privileged)); got != "full\n" {
		b.Errorf("block devices of a privileged container: %q; want none", got)
	}
	if got := c.shell(disks); got != before {
		b.Errorf("the guest's block devices were\n%s\nand are\n%s", before, got)
	}
}

// testLateDevices: a macvlan and a tap device appear in the namespace of a running pod.
func testLateDevices(p *pod, c *container) {
	// eventually asks until the answer is right: the watch of the namespace has no event outside the guest.
	eventually := func(script, want string) {
		p.Helper()
		if got := c.shell("for i in $(seq 100); do x=$(" + script + "); [ \"$x\" = '" + want + "' ] && break; sleep 0.2; done; echo \"$x\""); got != want {
			p.Errorf("%s: %q; want %q; the guest has %s", script, got, want, c.shell("ip addr; ip route"))
		}
	}
	p.host("ip", "link", "add", "parent0", "type", "veth", "peer", "name", "parent1")
	p.Cleanup(func() { p.host("ip", "link", "del", "parent0") }) // with what is on it
	for _, l := range []string{"parent0", "parent1"} {
		p.host("ip", "link", "set", l, "up")
	}
	p.host("ip", "link", "add", "link", "parent0", "name", "outside", "type", "macvlan", "mode", "bridge")
	p.host("ip", "address", "add", "10.88.81.1/24", "dev", "outside")
	p.host("ip", "link", "set", "outside", "up")
	p.host("ip", "link", "add", "link", "parent0", "name", "net2", "netns", strconv.Itoa(p.pid()), "type", "macvlan", "mode", "bridge")
	p.within("ip", "address", "add", "10.88.81.2/24", "dev", "net2")
	p.within("ip", "link", "set", "net2", "up")
	eventually("ip -o -4 addr show net2 2>/dev/null | grep -o 10.88.81.2/24", "10.88.81.2/24")
	c.shell("ping -c 1 -W 10 10.88.81.1")
	p.within("ip", "tuntap", "add", "dev", "net3", "mode", "tap")
	p.within("ip", "address", "add", "10.88.82.2/24", "dev", "net3")
	p.within("ip", "link", "set", "net3", "up")
	eventually("ip -o -4 addr show net3 2>/dev/null | grep -o 10.88.82.2/24", "10.88.82.2/24")
	p.within("ip", "link", "del", "net2")
	eventually("ls /sys/class/net | sort | xargs", "eth0 lo net1 net3")
	c.shell("ping -c 1 -W 10 10.88.80.1")
}
