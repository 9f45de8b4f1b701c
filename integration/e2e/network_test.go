// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"strings"
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

// server makes the outside of a pod answer greetings on port 80 of addresses of its own.
func server(outside *lab.NetNS, addrs ...string) {
	for _, a := range addrs {
		bits := "/32"
		if strings.Contains(a, ":") {
			bits = "/128"
		}
		outside.Addr("lo", a+bits)
		go greet(outside.Listen(net.JoinHostPort(a, "80")))
	}
}

// greeted asks for a greeting, which names the pod's address.
func (b *box) greeted(id, server, want string) {
	b.Helper()
	if got := b.shell(id, "nc -w 10 "+server+" 80 </dev/null"); got != "hello "+want {
		b.Errorf("the server at %s answers %q, want hello %s", server, got, want)
	}
}

// eventually asks until the answer is right: what the namespace's watch does has
// no event outside the guest.
func (b *box) eventually(id, script, want string) {
	b.Helper()
	got := b.shell(id, "for i in $(seq 100); do x=$("+script+"); [ \"$x\" = '"+want+"' ] && break; sleep 0.1; done; echo \"$x\"")
	if got != want {
		b.Errorf("%s: got %q, want %q; the guest has:\n%s", script, got, want, b.shell(id, "ip addr; ip route; ip -6 route"))
	}
}

// TestNetworkVeth: what CNI makes is what the container has, and after the pod
// the namespace is as it was.
func TestNetworkVeth(t *testing.T) {
	b := newBox(t)
	pod, outside := wired(t)
	outside.IP("link", "set", "host0", "mtu", "1400")
	pod.IP("link", "set", "eth0", "mtu", "1400")
	pod.Addr("eth0", "2001:db8:77::2/64")
	outside.Addr("host0", "2001:db8:77::1/64")
	pod.IP("-6", "route", "add", "default", "via", "2001:db8:77::1")
	pod.Veth("net1", outside, "host1")
	pod.Addr("net1", "10.78.0.2/24")
	outside.Addr("host1", "10.78.0.1/24")
	pod.IP("route", "add", "203.0.113.0/24", "via", "10.78.0.1", "dev", "net1", "src", "10.78.0.2")
	pod.IP("neigh", "add", "10.78.0.99", "lladdr", "02:00:00:00:00:99", "dev", "net1")
	pod.IP("-6", "neigh", "add", "2001:db8:77::99", "lladdr", "02:00:00:00:00:98", "dev", "eth0")
	server(outside, "198.51.100.1", "203.0.113.1", "2001:db8:78::1")
	before := pod.State()
	b.start("net", withNetNS(pod), "sleep", "1000")

	outside.Exec("busybox", "ping", "-c", "1", "-W", "5", "10.77.0.2")
	outside.Exec("busybox", "ping", "-c", "1", "-W", "5", "2001:db8:77::2")
	b.same("net", strings.Join([]string{ // one exec for all: each has its price
		"for s in 198.51.100.1 203.0.113.1 2001:db8:78::1; do nc -w 10 $s 80 </dev/null; done",
		"ping -c 1 -W 5 10.77.0.1 >/dev/null && ping -c 1 -W 5 127.0.0.1 >/dev/null && ping -c 1 -W 5 ::1 >/dev/null && echo pings",
		"cat /sys/class/net/eth0/mtu /sys/class/net/eth0/address",
		"ls /sys/class/net | sort | xargs",
		"ip neigh | grep -c PERMANENT",
	}, "\n"), strings.Join([]string{
		"hello 10.77.0.2", "hello 10.78.0.2", "hello 2001:db8:77::2", "pings",
		"1400", strings.TrimSpace(pod.Exec("cat", "/sys/class/net/eth0/address")), "eth0 lo net1", "2",
	}, "\n"))

	// What changes while the pod runs.
	pod.Veth("net2", outside, "host2")
	pod.Addr("net2", "10.79.0.2/24")
	outside.Addr("host2", "10.79.0.1/24")
	pod.IP("route", "add", "192.0.2.0/24", "via", "10.79.0.1")
	server(outside, "192.0.2.1")
	b.eventually("net", "ip route | grep 192.0.2.0/24 | xargs", "192.0.2.0/24 via 10.79.0.1 dev net2")
	b.greeted("net", "192.0.2.1", "10.79.0.2")
	pod.Addr("eth0", "10.77.0.3/24")
	b.eventually("net", "ip addr show eth0 | grep -c 'inet 10.77'", "2")
	pod.IP("route", "del", "192.0.2.0/24")
	b.eventually("net", "ip route | grep -c 192.0.2.0/24", "0")
	b.greeted("net", "198.51.100.1", "10.77.0.2") // the other routes stayed
	pod.IP("link", "del", "net2")
	b.eventually("net", "ls /sys/class/net | sort | xargs", "eth0 lo net1")
	pod.IP("addr", "del", "10.77.0.3/24", "dev", "eth0")

	b.remove("net")
	b.unchanged(pod, before)
}

// same checks the output of a command in the container.
func (b *box) same(id, script, want string) {
	b.Helper()
	if got := b.shell(id, script); got != strings.TrimSpace(want) {
		b.Errorf("%s: got %q, want %q", script, got, want)
	}
}
