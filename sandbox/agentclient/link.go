// SPDX-License-Identifier: Apache-2.0

package agentclient

import (
	"context"
	"sync"

	"github.com/containerd/ttrpc"

	"github.com/kata-v2/kata/protocols/agentpb"
)

// peer is one connection to the agent.
type peer struct {
	rpc        *ttrpc.Client
	agent      agentpb.AgentServiceService
	files      agentpb.FilesService
	checkpoint agentpb.CheckpointService
}

// link is the connection to the agent that there is now. While the guest is saved
// there is none, and calls wait.
type link struct {
	mu     sync.Mutex
	now    *peer         // guarded by mu; nil while there is none
	up     chan struct{} // guarded by mu; closed while there is one, and once closed
	closed bool          // guarded by mu
	shut   bool          // guarded by mu; short calls wait although there is one
	busy   int           // guarded by mu; short calls under way
	idle   chan struct{} // guarded by mu; closed when the last short call ends, nil if nobody waits
}

func newLink() *link { return &link{up: make(chan struct{})} }

// set makes a connection the present one.
func (l *link) set(rpc *ttrpc.Client) {
	p := &peer{
		rpc: rpc, agent: agentpb.NewAgentServiceClient(rpc), files: agentpb.NewFilesClient(rpc), checkpoint: agentpb.NewCheckpointClient(rpc),
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		rpc.Close()
		return
	}
	l.now, l.shut = p, false
	close(l.up)
}

// close ends the link for good: every call fails.
func (l *link) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.closed = true
	if l.now != nil {
		l.now.rpc.Close()
	}
	if l.now == nil || l.shut {
		close(l.up)
	}
}

// get waits for a connection.
func (l *link) get(ctx context.Context, brief bool) (*peer, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		switch {
		case l.closed && l.now == nil:
			return nil, ttrpc.ErrClosed
		case l.now != nil && (!l.shut || l.closed):
			if brief {
				l.busy++
			}
			return l.now, nil
		}
		up := l.up
		l.mu.Unlock()
		select {
		case <-up:
		case <-ctx.Done():
		}
		l.mu.Lock()
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
}

// done ends a short call.
func (l *link) done() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.busy--; l.busy == 0 && l.idle != nil {
		close(l.idle)
		l.idle = nil
	}
}

// hold makes calls wait and returns the connection when none is under way.
func (l *link) hold(ctx context.Context) (*peer, error) {
	l.mu.Lock()
	if l.now == nil || l.shut || l.closed {
		l.mu.Unlock()
		return nil, ttrpc.ErrClosed
	}
	l.shut, l.up = true, make(chan struct{})
	p := l.now
	if l.busy == 0 {
		l.mu.Unlock()
		return p, nil
	}
	idle := make(chan struct{})
	l.idle = idle
	l.mu.Unlock()
	select {
	case <-idle:
		return p, nil
	case <-ctx.Done():
		l.release()
		return nil, ctx.Err()
	}
}

// release lets calls go on over the connection that hold returned.
func (l *link) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.idle = nil
	if l.shut && !l.closed {
		l.shut = false
		close(l.up)
	}
}

// drop forgets the connection that hold returned; calls wait for the next.
func (l *link) drop() {
	l.mu.Lock()
	p := l.now
	l.now, l.shut = nil, false
	l.mu.Unlock()
	p.rpc.Close()
}

// present is the connection that there is, nil while there is none.
func (l *link) present() *peer {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now
}

// moved tells whether p is not the connection any more, and not because all has ended.
func (l *link) moved(p *peer) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now != p && !l.closed
}

func agentOf(p *peer) agentpb.AgentServiceService { return p.agent }
func filesOf(p *peer) agentpb.FilesService        { return p.files }

// short is a call that the end of a connection waits for.
func short[S, Req, Resp any](ctx context.Context, l *link, of func(*peer) S, r *Req, call func(S, context.Context, *Req) (*Resp, error)) (*Resp, error) {
	p, err := l.get(ctx, true)
	if err != nil {
		return nil, err
	}
	defer l.done()
	return call(of(p), ctx, r)
}

// long is a call that may take for ever: it begins anew on the next connection.
func long[S, Req, Resp any](ctx context.Context, l *link, of func(*peer) S, r *Req, call func(S, context.Context, *Req) (*Resp, error)) (*Resp, error) {
	for {
		p, err := l.get(ctx, false)
		if err != nil {
			return nil, err
		}
		resp, err := call(of(p), ctx, r)
		if err == nil || ctx.Err() != nil || !l.moved(p) {
			return resp, err
		}
	}
}
