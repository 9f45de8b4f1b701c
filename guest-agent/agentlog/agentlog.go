// SPDX-License-Identifier: Apache-2.0

// Package agentlog writes the agent's log: one JSON object a line with ts,
// level, msg and the event's keys. Lines go to a writer (the console) or, when
// the host asks for it, to whoever connects to a port; the last ones are kept so
// that a late reader and GetDiagnosticData still see them.
package agentlog

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/kata-v2/kata/guest-agent/vsocket"
)

// Keys of the log's fields.
const (
	KeyError     = "err"
	KeyContainer = "cid"
	KeyExec      = "exec"
	KeyMethod    = "method"
	KeyPort      = "port"
	KeyPID       = "pid"
	KeyDuration  = "t_ms"
	KeyModule    = "module"
	KeyStatus    = "status"
	KeyPath      = "path"
)

// Levels beyond slog's own, named as agent.log names them.
const (
	LevelTrace    = slog.LevelDebug - 4
	LevelCritical = slog.LevelError + 4
)

var levels = map[string]slog.Level{
	"critical": LevelCritical, "error": slog.LevelError, "warn": slog.LevelWarn,
	"info": slog.LevelInfo, "debug": slog.LevelDebug, "trace": LevelTrace,
}

// ParseLevel reads a level name: critical, error, warn, info, debug or trace.
func ParseLevel(s string) (slog.Level, error) {
	l, ok := levels[s]
	if !ok {
		return 0, fmt.Errorf("%q is not a level: want critical, error, warn, info, debug or trace", s)
	}
	return l, nil
}

// levelName is ParseLevel's inverse.
func levelName(l slog.Level) (string, bool) {
	for name, v := range levels {
		if v == l {
			return name, true
		}
	}
	return "", false
}

// ringSize bounds the memory of the kept lines, in bytes.
const ringSize = 64 << 10

// Sink receives the log's lines. It is safe for concurrent use; a slow reader
// loses lines rather than delaying the agent.
type Sink struct {
	mu      sync.Mutex
	out     io.Writer // guarded by mu; nil when only readers get the log
	ring    []byte    // guarded by mu; whole lines, oldest first
	readers map[chan []byte]struct{}
}

// NewSink makes a sink that writes to out, which may be nil.
func NewSink(out io.Writer) *Sink {
	return &Sink{out: out, readers: map[chan []byte]struct{}{}}
}

// Write takes one line.
func (s *Sink) Write(line []byte) (int, error) {
	cp := append([]byte(nil), line...)
	s.mu.Lock()
	s.ring = append(s.ring, cp...)
	for len(s.ring) > ringSize {
		s.ring = dropLine(s.ring)
	}
	for r := range s.readers {
		select {
		case r <- cp:
		default: // a reader that does not keep up misses this line
		}
	}
	out := s.out
	s.mu.Unlock()
	if out != nil {
		return out.Write(line)
	}
	return len(line), nil
}

func dropLine(b []byte) []byte {
	for i, c := range b {
		if c == '\n' {
			return b[i+1:] // append moves the rest to a fresh array when this one is used up
		}
	}
	return nil
}

// Kept returns the last lines, at most 64 KiB.
func (s *Sink) Kept() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]byte(nil), s.ring...)
}

// Serve writes the kept lines and then every new one to each connection of l,
// until ctx is done. It returns when all connections are finished.
func (s *Sink) Serve(ctx context.Context, l net.Listener) {
	vsocket.Serve(ctx, l, func(c net.Conn) { s.feed(ctx, c) })
}

func (s *Sink) feed(ctx context.Context, c net.Conn) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	ch := make(chan []byte, 64)
	s.mu.Lock()
	s.readers[ch] = struct{}{}
	kept := append([]byte(nil), s.ring...)
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.readers, ch)
		s.mu.Unlock()
	}()
	if _, err := c.Write(kept); err != nil {
		return
	}
	for {
		select {
		case line := <-ch:
			if _, err := c.Write(line); err != nil {
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// New makes a logger on s that drops what is below level.
func New(s *Sink, level slog.Level) *slog.Logger {
	return slog.New(handler{sink: s, level: level})
}

// rename gives the standard keys their names on the wire.
func rename(groups []string, a slog.Attr) slog.Attr {
	if len(groups) > 0 {
		return a
	}
	switch a.Key {
	case slog.TimeKey:
		return slog.String("ts", a.Value.Time().UTC().Format(time.RFC3339Nano))
	case slog.LevelKey:
		l, _ := a.Value.Any().(slog.Level)
		if name, ok := levelName(l); ok {
			return slog.String("level", name)
		}
	}
	return a
}
