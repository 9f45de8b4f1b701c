// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"testing"

	"github.com/kata-v2/kata/integration/lab"
)

// greet answers every connection with a line and what the client is called.
func greet(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
		fmt.Fprintln(c, "hello", host)
		c.Close()
	}
}

// wired is a pod's namespace with eth0, whose peer is in another one.
func wired(t *testing.T) (pod, outside *lab.NetNS) {
	t.Helper()
	pod, outside = lab.NewNetNS(t), lab.NewNetNS(t)
	pod.Veth("eth0", outside, "host0")
	pod.Addr("eth0", "10.77.0.2/24")
	outside.Addr("host0", "10.77.0.1/24")
	pod.IP("route", "add", "default", "via", "10.77.0.1")
	return pod, outside
}

func withNetNS(n *lab.NetNS) []string { return []string{"--with-ns", "network:" + n.Path} }

// TestNetworkVeth: what CNI makes is what the container has.
func TestNetworkVeth(t *testing.T) {
	b := newBox(t)
	pod, outside := wired(t)
	outside.Addr("lo", "198.51.100.1/32")
	go greet(outside.Listen("198.51.100.1:80"))
	before := pod.State()
	b.start("net", withNetNS(pod), "sleep", "1000")
	if got := b.shell("net", "ping -c 1 -W 5 10.77.0.1 >&2; nc 198.51.100.1 80 </dev/null"); got != "hello 10.77.0.2" {
		t.Errorf("the server answers %q", got)
	}
	outside.Exec("busybox", "ping", "-c", "1", "-W", "5", "10.77.0.2")
	b.remove("net")
	if after := pod.State(); after != before {
		t.Errorf("the namespace is not as it was:\n%s\nbefore:\n%s", after, before)
	}
}
