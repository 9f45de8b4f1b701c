// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/kata-v2/kata/integration/lab"
)

// hostFilter is the packet filter's program that the guest image has, on the host.
func hostFilter(t *testing.T) string {
	t.Helper()
	dir, err := lab.Dir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(filepath.Dir(dir), "iptables")
}

// TestIPTables: rules of the pod's packet filter are set from the host and by a
// container that may, each sees the other's, and they act.
func TestIPTables(t *testing.T) {
	b := newBox(t)
	pod, outside := wired(t)
	server(outside, "198.51.100.1") // and at no other address
	flags := append(withNetNS(pod), "--cap-add", "CAP_NET_ADMIN", "--mount", "type=bind,src="+hostFilter(t)+",dst=/tools,options=rbind:ro")
	b.start("fw", flags, "sleep", "1000")
	ctl := func(args ...string) string {
		t.Helper()
		out, err := b.kataCtl(append([]string{"iptables"}, args...)...)
		if err != nil {
			t.Errorf("kata-ctl iptables %s: %v", strings.Join(args, " "), err)
		}
		return out
	}

	if got := ctl("get", "--sandbox-id", "fw"); strings.Contains(got, "-A") {
		t.Errorf("a new pod has the rules %s", got)
	}
	// A container's own rule: the guest's kernel finds what it needs for it by itself.
	b.shell("fw", "XTABLES_LOCKFILE=/tmp/lock /tools/iptables -t nat -A OUTPUT -d 198.51.100.8 -p tcp -m comment --comment mine -j DNAT --to-destination 198.51.100.1")
	b.greeted("fw", "198.51.100.8", "10.77.0.2")
	if got := ctl("get", "--sandbox-id", "fw"); !strings.Contains(got, "-A OUTPUT -d 198.51.100.8/32 -p tcp -m comment --comment mine -j DNAT --to-destination 198.51.100.1\n") {
		t.Errorf("no rule of the container in %s", got)
	}

	dnat := "-A OUTPUT -d 198.51.100.9/32 -p tcp -m multiport --dports 80,81 -j DNAT --to-destination 198.51.100.1"
	rules := filepath.Join(t.TempDir(), "rules")
	writeFile(t, "*nat\n"+dnat+"\nCOMMIT\n*filter\n-A INPUT -m conntrack --ctstate INVALID -j DROP\nCOMMIT\n", rules)
	ctl("set", "--sandbox-id", "fw", rules)
	b.greeted("fw", "198.51.100.9", "10.77.0.2")
	got := ctl("get", "--sandbox-id", "fw")
	if !strings.Contains(got, dnat+"\n") || !strings.Contains(got, "--ctstate INVALID -j DROP\n") || strings.Contains(got, "mine") {
		t.Errorf("rules are %s; want those that were set, in place of the container's", got)
	}
	reject := "-A INPUT -p tcp -m tcp --dport 9 -j REJECT --reject-with tcp-reset"
	writeFile(t, "*filter\n"+reject+"\nCOMMIT\n", rules)
	ctl("set", "--sandbox-id", "fw", "--v6", rules)
	if got := ctl("get", "--sandbox-id", "fw", "--v6"); !strings.Contains(got, reject+"\n") || strings.Contains(got, "DNAT") {
		t.Errorf("IPv6 rules are %s", got)
	}

	// A rule that is wrong changes nothing and is named.
	writeFile(t, "*nat\n-A OUTPUT -j NOWHERE\nCOMMIT\n", rules)
	for _, refused := range [][]string{{"set", "--sandbox-id", "fw", rules}, {"get", "--sandbox-id", "nobody"}, {"set", "--sandbox-id", "fw", "/dev/null"}} {
		if _, err := b.kataCtl(append([]string{"iptables"}, refused...)...); err == nil {
			t.Errorf("%q is accepted", refused)
		}
	}
	if got := ctl("get", "--sandbox-id", "fw"); !strings.Contains(got, dnat+"\n") {
		t.Errorf("after a refusal the rules are %s", got)
	}
	b.remove("fw")
}
