// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"crypto/rand"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kata-v2/kata/internal/spawn"
)

// NetNS is a network namespace of a test's own, removed at its end.
type NetNS struct {
	Name, Path string
	tb         testing.TB
}

// NewNetNS makes an empty namespace whose loopback is up.
func NewNetNS(tb testing.TB) *NetNS {
	tb.Helper()
	n := &NetNS{Name: "kata-lab-" + strings.ToLower(rand.Text()[:8]), tb: tb}
	n.Path = filepath.Join("/run/netns", n.Name)
	runIP(tb, "netns", "add", n.Name)
	tb.Cleanup(func() { runIP(tb, "netns", "del", n.Name) })
	n.IP("link", "set", "lo", "up")
	return n
}

// IP runs `ip` in the namespace; it fails the test when that fails.
func (n *NetNS) IP(args ...string) string {
	n.tb.Helper()
	return runIP(n.tb, append([]string{"-n", n.Name}, args...)...)
}

// Exec runs a program of the host in the namespace.
func (n *NetNS) Exec(args ...string) string {
	n.tb.Helper()
	return runIP(n.tb, append([]string{"netns", "exec", n.Name}, args...)...)
}

// Veth makes a pair of devices, up: name in this namespace and peerName in peer.
func (n *NetNS) Veth(name string, peer *NetNS, peerName string) {
	n.tb.Helper()
	n.IP("link", "add", name, "type", "veth", "peer", "name", peerName, "netns", peer.Name)
	peer.IP("link", "set", peerName, "up")
	n.IP("link", "set", name, "up")
}

// Addr gives a device an address, without duplicate address detection.
func (n *NetNS) Addr(device, addr string) {
	n.tb.Helper()
	args := []string{"addr", "add", addr, "dev", device}
	if strings.Contains(addr, ":") {
		args = append(args, "nodad")
	}
	n.IP(args...)
}

// Listen opens a TCP listener in the namespace, closed at the test's end.
func (n *NetNS) Listen(addr string) (l net.Listener) {
	n.tb.Helper()
	n.do(func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	})
	n.tb.Cleanup(func() { l.Close() })
	return l
}

// Dial opens a TCP connection from the namespace to a numeric address, closed at the test's end.
func (n *NetNS) Dial(addr string) (c net.Conn) {
	n.tb.Helper()
	a, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		n.tb.Fatal(err)
	}
	// One address only: several would be dialled by goroutines on other threads.
	n.do(func() (err error) {
		c, err = net.DialTCP("tcp", nil, a)
		return err
	})
	n.tb.Cleanup(func() { c.Close() })
	return c
}

// do runs f on a thread in the namespace.
func (n *NetNS) do(f func() error) {
	n.tb.Helper()
	t := spawn.NewThread()
	defer t.Close()
	err := t.EnterNetNS(n.Path)
	if err == nil {
		err = t.Do(f)
	}
	if err != nil {
		n.tb.Fatal(err)
	}
}

// State describes the namespace's devices, addresses, routes and traffic control,
// for a comparison of before and after. Statistics and what changes by itself are
// not in it.
func (n *NetNS) State() string {
	n.tb.Helper()
	s := n.IP("-o", "link") + n.IP("-o", "addr") + n.IP("route") + n.IP("-6", "route") + n.Exec("tc", "qdisc") + n.Exec("tc", "filter")
	return strings.ReplaceAll(s, " tentative", "")
}

func runIP(tb testing.TB, args ...string) string {
	tb.Helper()
	var stderr strings.Builder
	cmd := exec.Command("ip", args...)
	cmd.Stderr = &stderr // it has something to say now and then when it succeeds, too
	out, err := cmd.Output()
	if err != nil {
		tb.Fatal(fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, stderr.String()))
	}
	return string(out)
}
