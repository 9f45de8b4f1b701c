// SPDX-License-Identifier: Apache-2.0

package cri

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/moby/spdystream"

	"github.com/kata-v2/kata/integration/lab/streaming"
)

// spdy is a connection to a streaming server.
type spdy struct {
	*box
	raw  net.Conn
	conn *spdystream.Connection
	wg   *sync.WaitGroup // whoever reads of it
}

// open connects to the address that the CRI answered. The server is in the
// network that the daemon takes for the host's.
func (b *box) open(address, protocol string) *spdy {
	b.Helper()
	u, err := url.Parse(address)
	b.ok(err)
	var c net.Conn
	b.ok(b.c.InHostNet(func() (err error) {
		c, err = net.Dial("tcp", u.Host)
		return err
	}))
	b.ok(c.SetDeadline(time.Now().Add(callTimeout)))
	conn, err := streaming.Open(c, address, protocol)
	b.ok(err)
	s := &spdy{box: b, raw: c, conn: conn, wg: &sync.WaitGroup{}}
	s.wg.Go(func() { conn.Serve(spdystream.NoOpStreamHandler) })
	b.Cleanup(func() { c.Close(); s.wg.Wait() })
	return s
}

// stream opens a stream.
func (s *spdy) stream(kind string, more ...string) *spdystream.Stream {
	s.Helper()
	h := http.Header{"Streamtype": {kind}}
	for i := 0; i < len(more); i += 2 {
		h.Set(more[i], more[i+1])
	}
	stream, err := s.conn.CreateStream(h, nil, false)
	s.ok(err)
	s.ok(stream.WaitTimeout(callTimeout))
	return stream
}

// received is what has come of a stream. Streams are read all the time: one that
// is not holds up the whole connection.
type received struct {
	mu   sync.Mutex
	cond *sync.Cond
	data []byte // guarded by mu
	over bool   // guarded by mu
}

// receive reads a stream to its end, which is also that of its connection.
func (s *spdy) receive(stream *spdystream.Stream) *received {
	r := &received{}
	r.cond = sync.NewCond(&r.mu)
	s.wg.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			n, err := stream.Read(buf)
			r.mu.Lock()
			r.data = append(r.data, buf[:n]...)
			r.over = err != nil
			r.cond.Broadcast()
			r.mu.Unlock()
			if err != nil {
				return
			}
		}
	})
	return r
}

// until returns what has come once enough says so of it, or when it is over.
func (r *received) until(enough func([]byte) bool) (data []byte, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for !enough(r.data) {
		if r.over {
			return r.data, false
		}
		r.cond.Wait()
	}
	return r.data, true
}

// all returns what has come when it is over.
func (r *received) all() []byte {
	data, _ := r.until(func([]byte) bool { return false })
	return data
}

// session is an exec or attach: the streams that were asked for, and the end.
type session struct {
	*spdy
	stdin, resizes         *spdystream.Stream
	stdout, stderr, errors *received
}

// session opens the streams of an exec or attach.
func (b *box) session(address string, stdin, tty bool) *session {
	b.Helper()
	s := &session{spdy: b.open(address, streaming.ExecProtocol)}
	s.errors = s.receive(s.stream("error"))
	if stdin {
		s.stdin = s.stream("stdin")
	}
	s.stdout = s.receive(s.stream("stdout"))
	if tty {
		s.resizes = s.stream("resize")
	} else {
		s.stderr = s.receive(s.stream("stderr"))
	}
	return s
}

// write writes to stdin.
func (s *session) write(text string) {
	s.Helper()
	_, err := io.WriteString(s.stdin, text)
	s.ok(err)
}

// expect waits until stdout has shown text and returns all of it so far.
func (s *session) expect(text string) string {
	s.Helper()
	data, ok := s.stdout.until(func(b []byte) bool { return bytes.Contains(b, []byte(text)) })
	if !ok {
		s.Fatalf("stdout is %q; want %q", data, text)
	}
	return string(data)
}

// shows tells whether stdout has shown text so far.
func (s *session) shows(text string) bool {
	data, _ := s.stdout.until(func([]byte) bool { return true })
	return bytes.Contains(data, []byte(text))
}

// insist writes a line again whenever one has been answered, until stdout shows
// text: what the line asks for is a moment behind.
func (s *session) insist(line, text string) {
	s.Helper()
	asked := 0
	_, ok := s.stdout.until(func(b []byte) bool {
		if bytes.Contains(b, []byte(text)) {
			return true
		}
		if answered := bytes.Count(b, []byte("<"+line+">")); answered == asked {
			asked++
			s.write(line + "\n")
		}
		return false
	})
	if !ok {
		s.Fatalf("stdout does not show %q", text)
	}
}

// detach cuts the connection.
func (s *session) detach() { s.raw.Close() }

// resize tells the terminal's size.
func (s *session) resize(columns, rows int) {
	s.Helper()
	s.ok(json.NewEncoder(s.resizes).Encode(map[string]int{"Width": columns, "Height": rows}))
}

// end returns the exit code, once the session is over.
func (s *session) end() int {
	s.Helper()
	data := s.errors.all()
	// The part of a metav1.Status that is needed.
	var status struct {
		Status, Message, Reason string
		Details                 struct {
			Causes []struct{ Reason, Message string }
		}
	}
	if err := json.Unmarshal(data, &status); err != nil {
		s.Fatalf("status %q: %v", data, err)
	}
	if status.Status == "Success" {
		return 0
	}
	for _, c := range status.Details.Causes {
		if code, err := strconv.Atoi(c.Message); err == nil && c.Reason == "ExitCode" {
			return code
		}
	}
	s.Fatalf("session failed: %s", data)
	return -1
}

// forwarded is one connection of a port forward.
type forwarded struct {
	*spdystream.Stream
	data, errors *received
}

// connect opens a connection to a port of the pod.
func (s *spdy) connect(id, port int) *forwarded {
	s.Helper()
	p, r := strconv.Itoa(port), strconv.Itoa(id)
	errors := s.stream("error", "port", p, "requestID", r)
	s.ok(errors.Close()) // the server's alone
	data := s.stream("data", "port", p, "requestID", r)
	return &forwarded{data, s.receive(data), s.receive(errors)}
}
