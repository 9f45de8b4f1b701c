// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/kata-v2/kata/guest-agent/agentlog"
	"github.com/kata-v2/kata/guest-agent/engine"
	"github.com/kata-v2/kata/guest-agent/reaper"
	"github.com/kata-v2/kata/guest-agent/streams"
)

// streamTimeout bounds the wait for the connection that a request names: the
// host has dialled it before, so it is at most late by a scheduling delay.
const streamTimeout = 10 * time.Second

// Ports are the host's source ports of the three stdio connections; 0: none.
type Ports struct{ Stdin, Stdout, Stderr uint32 }

// Process is the init of a container or an exec in it.
type Process struct {
	ExecID string
	IO     *streams.Set

	eng    *engine.Process
	done   chan struct{} // closed when the process is gone; status is set before
	status reaper.Status
	waited bool // guarded by the container's mu; somebody has been told the status
}

// PID is the process's number in the guest.
func (p *Process) PID() int { return p.eng.PID }

func (p *Process) exited() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// openStreams claims the connections and makes the process's stdio.
func (p *Pod) openStreams(ctx context.Context, ports Ports, terminal bool) (*streams.Set, error) {
	ctx, cancel := context.WithTimeout(ctx, streamTimeout)
	defer cancel()
	cfg := streams.Config{
		Terminal: terminal, PipeSize: p.cfg.Params.PipeSize,
		// A host that asked for streams and names none wants no stdio at all;
		// one that never heard of them will read and write by request.
		Poll: ports == Ports{} && !p.cfg.Params.StreamsAsked,
	}
	var err error
	for _, s := range []struct {
		port uint32
		dst  *net.Conn
	}{{ports.Stdin, &cfg.Stdin}, {ports.Stdout, &cfg.Stdout}, {ports.Stderr, &cfg.Stderr}} {
		if s.port == 0 || err != nil {
			continue
		}
		*s.dst, err = p.cfg.Hub.Take(ctx, s.port)
	}
	var set *streams.Set
	if err == nil {
		set, err = streams.New(cfg)
	}
	if err != nil {
		for _, c := range []net.Conn{cfg.Stdin, cfg.Stdout, cfg.Stderr} {
			if c != nil {
				c.Close()
			}
		}
		return nil, err
	}
	return set, nil
}

// adopt makes a Process of what the engine left running, and watches it. publish
// files it; that comes first, since the process may be gone already.
func (c *Container) adopt(execID string, ep *engine.Process, set *streams.Set, publish func(*Process)) {
	pr := &Process{ExecID: execID, IO: set, eng: ep, done: make(chan struct{})}
	set.Started(ep.Console)
	publish(pr)
	c.watchers.Add(1)
	go func() {
		defer c.watchers.Done()
		c.watch(pr)
	}()
}

// watch lives as long as the process and its output.
func (c *Container) watch(pr *Process) {
	pr.status = <-pr.eng.Exit
	pr.eng.Release()
	pr.IO.Exited()
	c.processGone(pr)
	if err := c.pod.cfg.Storage.Corruption(c.storages); err != nil {
		c.pod.cfg.Log.Error("a process may have ended for it", agentlog.KeyContainer, c.ID, agentlog.KeyError, err.Error())
	}
	close(pr.done)
	select {
	case <-pr.IO.Drained():
	case <-c.life.Done():
	}
	pr.IO.Close(c.drainContext())
	c.forget(pr)
}

// wait returns the status when the process is gone.
func (c *Container) wait(ctx context.Context, pr *Process) (reaper.Status, error) {
	select {
	case <-pr.done:
	case <-ctx.Done():
		return reaper.Status{}, errors.Join(errors.New("wait for process"), context.Cause(ctx))
	}
	c.mu.Lock()
	pr.waited = true
	c.mu.Unlock()
	c.forget(pr)
	return pr.status, nil
}

// forget drops an exec that was waited for and whose output is complete.
func (c *Container) forget(pr *Process) {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-pr.IO.Drained():
	default:
		return
	}
	if pr.waited && c.execs[pr.ExecID] == pr {
		delete(c.execs, pr.ExecID)
	}
}
