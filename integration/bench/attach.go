// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/moby/spdystream"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/kata-v2/kata/integration/lab/streaming"
)

// attachRow is an attach through the CRI's streaming server: from the request
// until the first byte of an answer to what was written.
const attachRow = "pod-attach"

// attach adds a container that runs cat to the pod and measures an attach to it.
func (p *criPod) attach(ctx context.Context) (time.Duration, error) {
	cat, err := p.containerWith(ctx, &runtimeapi.ContainerConfig{Command: []string{"cat"}, Stdin: true}, 0)
	if err != nil {
		return 0, err
	}
	began := time.Now()
	resp, err := p.e.cri.Attach(ctx, &runtimeapi.AttachRequest{ContainerId: cat, Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		return 0, err
	}
	if err := p.e.echo(resp.Url); err != nil {
		return 0, fmt.Errorf("%s: %w", resp.Url, err)
	}
	return time.Since(began), nil
}

// echo writes one line to the streams of an address and returns when its first byte comes back.
func (e *Env) echo(address string) error {
	u, err := url.Parse(address)
	if err != nil {
		return err
	}
	var c net.Conn
	err = e.c.InHostNet(func() (err error) {
		c, err = net.Dial("tcp", u.Host)
		return err
	})
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer c.Close() // ends whoever reads of it
	if err := c.SetDeadline(time.Now().Add(callTimeout)); err != nil {
		return err
	}
	conn, err := streaming.Open(c, address, streaming.ExecProtocol)
	if err != nil {
		return err
	}
	wg.Go(func() { conn.Serve(spdystream.NoOpStreamHandler) })
	streams := map[string]*spdystream.Stream{}
	for _, kind := range []string{"error", "stdin", "stdout", "stderr"} {
		s, err := conn.CreateStream(http.Header{"Streamtype": {kind}}, nil, false)
		if err != nil {
			return err
		}
		if err := s.WaitTimeout(callTimeout); err != nil {
			return fmt.Errorf("%s: %w", kind, err)
		}
		streams[kind] = s
	}
	// A stream that is not read holds up the whole connection.
	for _, kind := range []string{"error", "stderr"} {
		wg.Go(func() { _, _ = io.Copy(io.Discard, streams[kind]) })
	}
	if _, err := io.WriteString(streams["stdin"], "x\n"); err != nil {
		return err
	}
	_, err = io.ReadFull(streams["stdout"], make([]byte, 1))
	return err
}
