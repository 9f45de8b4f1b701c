// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/libp2p/go-yamux/v5"
	"golang.org/x/sys/unix"
)

// Bounds of one channel.
const (
	maxStreams  = 1024
	backlog     = 128              // streams of a port that nobody has accepted
	window      = 1 << 20          // bytes of a stream that nobody has read
	headTimeout = 10 * time.Second // for the first bytes of a stream
	firstPort   = 1 << 16          // of the ports that are picked: those below are asked for by number
	never       = 365 * 24 * time.Hour
)

// Config says who is who.
type Config struct {
	// Host is true at the host's end.
	Host bool
	// Addr makes a net.Addr of a port of this end or the other.
	Addr func(peer bool, port uint32) net.Addr
}

// Mux is one end of a channel. It listens and dials before it is attached:
// what is dialled waits.
type Mux struct {
	c    Config
	done chan struct{} // closed when it has ended
	wg   sync.WaitGroup

	mu        sync.Mutex
	up        chan struct{}        // guarded by mu; closed while attached, and once it has ended
	s         *yamux.Session       // guarded by mu; nil while not attached
	line      *session             // guarded by mu; what s is over, nil for what is no Line
	off       chan struct{}        // guarded by mu; closed when what was attached last is not any more
	listeners map[uint32]*listener // guarded by mu
	next      uint32               // guarded by mu; the port that is picked next
	err       error                // guarded by mu; why it has ended, nil while it has not
}

// New makes an end without a connection.
func New(c Config) *Mux {
	return &Mux{c: c, up: make(chan struct{}), done: make(chan struct{}), listeners: map[uint32]*listener{}, next: firstPort}
}

// Attach starts the streams over conn, which the Mux owns from now on. The Mux
// ends with conn, unless that is a Line and its session ends in order: then it can
// be attached again. Listeners stay meanwhile, and what is dialled waits.
func (m *Mux) Attach(conn net.Conn) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return errors.Join(m.err, conn.Close())
	}
	if m.s != nil {
		return errors.New("channel: attached already")
	}
	m.line = nil
	if l, ok := conn.(*Line); ok {
		m.line = newSession(l, m.c.Host)
		conn = m.line
	}
	c := yamux.DefaultConfig()
	c.EnableKeepAlive = false
	c.MeasureRTTInterval = never // an idle guest has no timers of ours
	c.ConnectionWriteTimeout = never
	c.MaxIncomingStreams = maxStreams
	c.AcceptBacklog = backlog
	c.MaxStreamWindowSize = window
	c.LogOutput = io.Discard
	c.ReadBufSize = 64 << 10
	c.WriteCoalesceDelay = 0
	open := yamux.Server
	if m.c.Host {
		open = yamux.Client
	}
	s, err := open(conn, c, nil)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	line, off := m.line, make(chan struct{})
	m.s, m.off = s, off
	close(m.up)
	m.wg.Go(func() {
		m.accept(s)
		_ = s.Close() // returns when the one that is under way has, which writes the mark
		if line != nil && line.orderly() && m.detached(s, off) {
			return
		}
		m.end(unix.ECONNRESET)
	})
	return nil
}

// detached notes the orderly end of a session; false: the Mux has ended.
func (m *Mux) detached(s *yamux.Session, off chan struct{}) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return false
	}
	m.s, m.up = nil, make(chan struct{})
	close(off)
	return true
}

// Detached is closed when the session of the last Attach has ended in order. It is
// nil before any.
func (m *Mux) Detached() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.off
}

// Detach ends the session of a Line, and every stream with it, at both ends; what
// this end has not read of a stream is lost. The Line stays with the caller.
func (m *Mux) Detach(ctx context.Context) error {
	m.mu.Lock()
	s, line, off := m.s, m.line, m.off
	m.mu.Unlock()
	if s == nil || line == nil {
		return errors.New("channel: detach: there is no session over a Line")
	}
	line.leave()
	stop := context.AfterFunc(ctx, func() { _ = line.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := s.Close(); err != nil {
		return err
	}
	select {
	case <-off:
	case <-m.done:
		return m.Err()
	}
	if err := line.finish(ctx); err != nil {
		return fmt.Errorf("channel: wait for the other end: %w", err)
	}
	return nil
}

// Done is closed when the channel has ended.
func (m *Mux) Done() <-chan struct{} { return m.done }

// Err says what ended the channel; nil before Done.
func (m *Mux) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Close ends every stream and listener.
func (m *Mux) Close() error {
	m.end(net.ErrClosed)
	m.wg.Wait()
	return nil
}

// Fail ends the Mux, because of err.
func (m *Mux) Fail(err error) { m.end(err) }

func (m *Mux) end(err error) {
	m.mu.Lock()
	if m.err != nil {
		m.mu.Unlock()
		return
	}
	m.err = err
	s, ls := m.s, m.listeners
	m.listeners = map[uint32]*listener{}
	if s == nil {
		close(m.up)
	}
	m.mu.Unlock()
	if s != nil {
		s.Close()
	}
	for _, l := range ls {
		l.shut()
	}
	close(m.done)
}

func (m *Mux) accept(s *yamux.Session) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		st, err := s.AcceptStream()
		if err != nil {
			return
		}
		wg.Go(func() { m.arrive(st) })
	}
}

// arrive hands a stream of the other end to whoever listens.
func (m *Mux) arrive(st *yamux.Stream) {
	var head [8]byte
	_ = st.SetReadDeadline(time.Now().Add(headTimeout))
	if _, err := io.ReadFull(st, head[:]); err != nil {
		_ = st.Reset()
		return
	}
	_ = st.SetReadDeadline(time.Time{})
	to, from := binary.LittleEndian.Uint32(head[:]), binary.LittleEndian.Uint32(head[4:])
	m.mu.Lock()
	l := m.listeners[to]
	m.mu.Unlock()
	if l == nil {
		refuse(st, unix.ECONNREFUSED)
		return
	}
	select {
	case l.room <- struct{}{}:
	default:
		refuse(st, unix.EAGAIN)
		return
	}
	if _, err := st.Write([]byte{0}); err != nil {
		_ = st.Reset()
		<-l.room
		return
	}
	l.put(m.conn(st, to, from))
}

func refuse(st *yamux.Stream, errno unix.Errno) {
	_, _ = st.Write([]byte{byte(errno)})
	_ = st.Close()
}

func (m *Mux) conn(st *yamux.Stream, local, remote uint32) *Conn {
	return newConn(m, st, m.c.Addr(false, local), m.c.Addr(true, remote))
}

// Dial opens a stream to a port of the other end. Errors are *net.OpError.
func (m *Mux) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	remote := m.c.Addr(true, port)
	c, err := m.dial(ctx, port)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: remote.Network(), Addr: remote, Err: err}
	}
	return c, nil
}

func (m *Mux) dial(ctx context.Context, port uint32) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	for m.s == nil && m.err == nil {
		up := m.up
		m.mu.Unlock()
		select {
		case <-up:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		m.mu.Lock()
	}
	s, err := m.s, m.err
	own := m.pick()
	m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	st, err := s.OpenStream(ctx)
	if err != nil {
		return nil, lost(err)
	}
	stop := context.AfterFunc(ctx, func() { _ = st.SetDeadline(time.Unix(1, 0)) })
	head := binary.LittleEndian.AppendUint32(nil, port)
	head = binary.LittleEndian.AppendUint32(head, own)
	_, err = st.Write(head)
	var answer [1]byte
	if err == nil {
		_, err = io.ReadFull(st, answer[:])
	}
	if !stop() {
		err = ctx.Err()
	}
	if err == nil && answer[0] == 0 {
		return m.conn(st, own, port), nil
	}
	_ = st.Reset()
	if err == nil {
		err = unix.Errno(answer[0])
	}
	return nil, lost(err)
}

// pick is a port that is not in use; m.mu is held. 2^32 streams are not open
// at a time, so only listeners are looked at.
func (m *Mux) pick() uint32 {
	for {
		p := m.next
		m.next = max(m.next+1, firstPort)
		if m.listeners[p] == nil {
			return p
		}
	}
}

// Listen accepts streams of the other end to a port of this one; 0 picks one.
func (m *Mux) Listen(port uint32) (net.Listener, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if port == 0 {
		port = m.pick()
	}
	a := m.c.Addr(false, port)
	err := m.err
	if err == nil && m.listeners[port] != nil {
		err = unix.EADDRINUSE
	}
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: a.Network(), Addr: a, Err: err}
	}
	l := &listener{m: m, port: port, addr: a, queue: make(chan *Conn, backlog), room: make(chan struct{}, backlog), closed: make(chan struct{})}
	m.listeners[port] = l
	return l, nil
}

// lost gives an error of yamux the kind that callers look for.
func lost(err error) error {
	for _, e := range []error{yamux.ErrSessionShutdown, yamux.ErrStreamClosed, yamux.ErrStreamReset, yamux.ErrRemoteGoAway} {
		if errors.Is(err, e) {
			return unix.ECONNRESET
		}
	}
	return err
}
