// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxQMPLine bounds one message of QEMU; longer ones end the connection.
const maxQMPLine = 1 << 20

// errQMPClosed ends every command that is under way when QEMU goes away.
var errQMPClosed = errors.New("QMP connection closed")

// QMPError is QEMU's refusal of a command (QEMU docs/interop/qmp-spec).
type QMPError struct {
	Command, Class, Desc string
}

func (e *QMPError) Error() string {
	return fmt.Sprintf("QMP %s: %s (%s)", e.Command, e.Desc, e.Class)
}

// qmpEvent is an asynchronous message of QEMU.
type qmpEvent struct {
	Name string
	Data json.RawMessage
}

// qmp is a client of QEMU's machine protocol: commands may be issued
// concurrently and are answered by id; events go to one callback.
type qmp struct {
	conn   io.ReadWriteCloser
	event  func(qmpEvent)
	closed chan struct{} // when the reader has ended

	wmu sync.Mutex // one writer at a time; held across the write of one line only

	mu      sync.Mutex
	next    uint64                   // guarded by mu
	pending map[uint64]chan qmpReply // guarded by mu; nil after the reader ended
}

type qmpReply struct {
	value json.RawMessage
	err   *QMPError
}

type qmpMessage struct {
	Greeting json.RawMessage `json:"QMP"`
	Event    string          `json:"event"`
	Data     json.RawMessage `json:"data"`
	Return   json.RawMessage `json:"return"`
	Error    *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	ID uint64 `json:"id"`
}

// newQMP reads the greeting in the background, so that it can be called before
// QEMU runs. The reader ends when conn does.
func newQMP(conn io.ReadWriteCloser, event func(qmpEvent)) *qmp {
	q := &qmp{conn: conn, event: event, closed: make(chan struct{}), pending: map[uint64]chan qmpReply{}}
	go q.read()
	return q
}

func (q *qmp) read() {
	defer close(q.closed)
	sc := bufio.NewScanner(q.conn)
	sc.Buffer(make([]byte, 4096), maxQMPLine)
	for sc.Scan() {
		var m qmpMessage
		if err := json.Unmarshal(sc.Bytes(), &m); err != nil {
			break
		}
		switch {
		case m.Event != "":
			q.event(qmpEvent{Name: m.Event, Data: m.Data})
		case m.Greeting != nil:
		default:
			q.reply(m)
		}
	}
	q.mu.Lock()
	pending := q.pending
	q.pending = nil
	q.mu.Unlock()
	for _, ch := range pending {
		close(ch)
	}
}

func (q *qmp) reply(m qmpMessage) {
	q.mu.Lock()
	ch := q.pending[m.ID]
	delete(q.pending, m.ID)
	q.mu.Unlock()
	if ch == nil {
		return
	}
	r := qmpReply{value: m.Return}
	if m.Error != nil {
		r.err = &QMPError{Class: m.Error.Class, Desc: m.Error.Desc}
	}
	ch <- r
}

// execute runs one command and decodes its answer into out, which may be nil.
func (q *qmp) execute(ctx context.Context, command string, args, out any) error {
	return q.executeWith(ctx, command, args, out, nil)
}

// executeWith is execute for a command that takes a descriptor with it, or none.
func (q *qmp) executeWith(ctx context.Context, command string, args, out any, file *os.File) error {
	ch := make(chan qmpReply, 1)
	q.mu.Lock()
	if q.pending == nil {
		q.mu.Unlock()
		return fmt.Errorf("QMP %s: %w", command, errQMPClosed)
	}
	q.next++
	id := q.next
	q.pending[id] = ch
	q.mu.Unlock()

	if err := q.send(command, args, id, file); err != nil {
		q.forget(id)
		return err
	}
	select {
	case r, ok := <-ch:
		switch {
		case !ok:
			return fmt.Errorf("QMP %s: %w", command, errQMPClosed)
		case r.err != nil:
			r.err.Command = command
			return r.err
		case out != nil:
			if err := json.Unmarshal(r.value, out); err != nil {
				return fmt.Errorf("QMP %s: decode answer: %w", command, err)
			}
		}
		return nil
	case <-ctx.Done():
		q.forget(id)
		return fmt.Errorf("QMP %s: %w", command, ctx.Err())
	}
}

func (q *qmp) send(command string, args any, id uint64, file *os.File) error {
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id})
	if err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	q.wmu.Lock()
	defer q.wmu.Unlock()
	line = append(line, '\n')
	if file != nil {
		// The descriptor goes with the first byte (unix(7), SCM_RIGHTS).
		if err = sendFile(q.conn, line[:1], file); err == nil {
			line = line[1:]
		}
	}
	if err == nil {
		_, err = q.conn.Write(line)
	}
	if err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	return nil
}

func (q *qmp) forget(id uint64) {
	q.mu.Lock()
	delete(q.pending, id)
	q.mu.Unlock()
}

// sendFile writes b, one byte, together with a descriptor.
func sendFile(conn io.Writer, b []byte, file *os.File) error {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return fmt.Errorf("%T passes no descriptors", conn)
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = rc.Write(func(fd uintptr) bool {
		serr = unix.Sendmsg(int(fd), b, unix.UnixRights(int(file.Fd())), nil, unix.MSG_NOSIGNAL)
		return !errors.Is(serr, unix.EAGAIN)
	})
	return errors.Join(err, serr)
}

// close ends the connection and waits for the reader.
func (q *qmp) close() {
	q.conn.Close()
	<-q.closed
}
