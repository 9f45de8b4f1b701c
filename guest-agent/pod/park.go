// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"context"
	"errors"
	"net"
	"sync"

	"github.com/kata-v2/kata/guest-agent/streams"
)

// BeginPark says that Park follows.
func (p *Pod) BeginPark() {
	for _, c := range p.Containers() {
		for _, set := range c.streams() {
			set.BeginPark()
		}
	}
}

// Park brings the streams of all processes to rest, so that the guest can be saved
// and another host can Attach to them.
func (p *Pod) Park(ctx context.Context) error {
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	for _, c := range p.Containers() {
		for _, set := range c.streams() {
			wg.Go(func() {
				err := set.Park(ctx)
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, err)
			})
		}
	}
	wg.Wait()
	return errors.Join(errs...)
}

// streams are those of all processes.
func (c *Container) streams() (out []*streams.Set) {
	if c.init != nil {
		out = append(out, c.init.IO)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, pr := range c.execs {
		if pr != nil {
			out = append(out, pr.IO)
		}
	}
	return out
}

// Attach gives a process whose streams are parked new connections; for one that
// has gone they are closed.
func (p *Pod) Attach(ctx context.Context, container, execID string, ports Ports) error {
	conns, err := p.take(ctx, ports)
	if err != nil {
		return err
	}
	pr, err := p.process(container, execID)
	if err == nil && !pr.IO.Polled() {
		return pr.IO.Attach(conns[0], conns[1], conns[2])
	}
	for _, conn := range conns {
		if conn != nil {
			conn.Close()
		}
	}
	return nil
}

func (p *Pod) process(container, execID string) (*Process, error) {
	c, err := p.Container(container)
	if err != nil {
		return nil, err
	}
	return c.Process(execID)
}

// take claims the connections of stdin, stdout and stderr.
func (p *Pod) take(ctx context.Context, ports Ports) (conns [3]net.Conn, err error) {
	ctx, cancel := context.WithTimeout(ctx, streamTimeout)
	defer cancel()
	for i, port := range []uint32{ports.Stdin, ports.Stdout, ports.Stderr} {
		if port == 0 {
			continue
		}
		if conns[i], err = p.cfg.Hub.Take(ctx, port); err != nil {
			break
		}
	}
	if err == nil {
		return conns, nil
	}
	for _, conn := range conns {
		if conn != nil {
			conn.Close()
		}
	}
	return conns, err
}
