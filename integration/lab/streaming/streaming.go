// SPDX-License-Identifier: Apache-2.0

// Package streaming opens connections to the CRI's streaming servers: SPDY/3.1 by
// an HTTP upgrade, as kubelet and kubectl do it (k8s.io/cri-streaming).
package streaming

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"

	"github.com/moby/spdystream"
)

// Protocols of the servers (remotecommand and portforward).
const (
	ExecProtocol    = "v4.channel.k8s.io"
	ForwardProtocol = "portforward.k8s.io"
)

// Open upgrades c, which is connected to the server of an address that the CRI
// answered. The caller runs Serve of what it returns, and closes c.
func Open(c net.Conn, address, protocol string) (*spdystream.Connection, error) {
	req, err := http.NewRequest(http.MethodPost, address, nil)
	if err != nil {
		return nil, fmt.Errorf("streaming: %w", err)
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "SPDY/3.1")
	req.Header.Set("X-Stream-Protocol-Version", protocol)
	if err := req.Write(c); err != nil {
		return nil, fmt.Errorf("streaming: %s: %w", address, err)
	}
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, req)
	if err != nil {
		return nil, fmt.Errorf("streaming: %s: %w", address, err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols || r.Buffered() != 0 {
		body, _ := io.ReadAll(resp.Body)
		return nil, fmt.Errorf("streaming: %s: %s: %s", address, resp.Status, body)
	}
	conn, err := spdystream.NewConnection(c, false)
	if err != nil {
		return nil, fmt.Errorf("streaming: %s: %w", address, err)
	}
	return conn, nil
}
