// SPDX-License-Identifier: Apache-2.0

package cri

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/kata-v2/kata/integration/lab"
)

// gateway is the bridge's address.
var gateway = strings.TrimSuffix(lab.PodSubnet, "0/24") + "1"

// get asks a web server from the lab's host.
func (b *box) get(address string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
			nerr := b.c.InHostNet(func() error {
				// No parallel attempts: they would run on other threads.
				c, err = (&net.Dialer{FallbackDelay: -1}).DialContext(ctx, network, addr)
				return err
			})
			return c, nerr
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/", nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return strings.TrimSpace(string(body)), err
}

// TestPodNetwork: the pod has the address that CNI gave it; host and pods reach
// servers in it, at its address and at a host port; it reaches the host.
func TestPodNetwork(t *testing.T) { each(t, testPodNetwork, pauseMode, oldMode) }

func testPodNetwork(b *box) {
	p := b.run(func(c *runtimeapi.PodSandboxConfig) {
		c.PortMappings = []*runtimeapi.PortMapping{{Protocol: runtimeapi.Protocol_TCP, ContainerPort: 8000, HostPort: 18000}}
	})
	ip := p.ip()
	if _, subnet, _ := net.ParseCIDR(lab.PodSubnet); !subnet.Contains(net.ParseIP(ip)) {
		b.Fatalf("address %q", ip)
	}
	c := p.start(p.script("mkdir /www; echo $HOSTNAME >/www/index.html; httpd -p 8000 -h /www; echo up; exec sleep 1000"))
	c.awaitLog("up\n")
	if got := c.shell("ip -4 addr show dev eth0 | awk '/inet /{print $2}'"); got != ip+"/24" {
		b.Errorf("eth0 has %q; the CRI says %s", got, ip)
	}
	for _, address := range []string{ip + ":8000", lab.HostAddress + ":18000"} {
		if got, err := b.get(address); err != nil || got != p.config.Hostname {
			b.Errorf("%s: %q, %v", address, got, err)
		}
	}
	c.shell("ping -c 1 -W 5 " + gateway)

	q := b.run()
	d := q.sleeper()
	// Not wget: a static one looks for the C library's resolver even for a number.
	if got := d.shell(fmt.Sprintf("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 %s 8000 | tail -n 1", ip)); got != p.config.Hostname {
		b.Errorf("from another pod: %q", got)
	}
}

// TestHostNamespaces: a machine cannot use the host's network, nor its processes,
// IPC objects or users.
func TestHostNamespaces(t *testing.T) {
	each(t, func(b *box) {
		const node = runtimeapi.NamespaceMode_NODE
		for field, o := range map[string]*runtimeapi.NamespaceOption{
			"network": {Network: node}, "pid": {Pid: node}, "ipc": {Ipc: node},
			"user": {UsernsOptions: &runtimeapi.UserNamespace{
				Uids: []*runtimeapi.IDMapping{{HostId: 100_000, Length: 65536}}, Gids: []*runtimeapi.IDMapping{{HostId: 100_000, Length: 65536}},
			}},
		} {
			if b.mode.version == "2.2" && b.mode.handler == lab.HandlerSandbox && field == "network" {
				continue // that containerd ends by itself before it asks the shim: docs/cri.md
			}
			if b.mode.version == "1.6" && field == "user" {
				continue // whose CRI has no such field
			}
			b.refused(b.mode.handler, func(c *runtimeapi.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions = o }, field)
		}
	})
}
