// SPDX-License-Identifier: Apache-2.0

package agentclient

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/containerd/ttrpc"

	"github.com/kata-v2/kata/protocols/agentpb"
)

func noErr(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// bound is the longest that a test waits.
func bound(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func readN(t *testing.T, r io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(r, got); err != nil || string(got) != want {
		t.Fatalf("read %q, %v; want %q", got, err, want)
	}
}

// Output goes on over the next connection, and what nobody had read comes first.
func TestOutStream(t *testing.T) {
	a, guest := net.Pipe()
	o := &outStream{stay: newStay(a)}
	go func() { _, _ = io.WriteString(guest, "onetwo"); guest.Close() }()
	readN(t, o, "one")
	o.park()
	noErr(t, o.collect(bound(t)))
	readN(t, o, "two")
	rest := make(chan string)
	go func() { // waits for the next connection
		b, _ := io.ReadAll(o)
		rest <- string(b)
	}()
	b, guest2 := net.Pipe()
	o.attach(b)
	_, err := io.WriteString(guest2, "three")
	noErr(t, err)
	guest2.Close()
	if got := <-rest; got != "three" {
		t.Errorf("rest %q", got)
	}
}

// A reader that meets the end of a parked connection waits; a dropped stream wakes it.
func TestOutStreamReaderParks(t *testing.T) {
	a, guest := net.Pipe()
	o := &outStream{stay: newStay(a)}
	got := make(chan error)
	go func() {
		_, err := o.Read(make([]byte, 1))
		got <- err
	}()
	o.park()
	guest.Close()
	noErr(t, o.collect(bound(t)))
	select {
	case err := <-got:
		t.Fatalf("the reader has not waited: %v", err)
	default:
	}
	o.drop()
	if err := <-got; !errors.Is(err, net.ErrClosed) {
		t.Errorf("the reader of a dropped stream: %v", err)
	}
}

// Input waits for the next connection, and an end that comes meanwhile stays one.
func TestInStream(t *testing.T) {
	a, guest := net.Pipe()
	in := &inStream{stay: newStay(a)}
	in.park()
	go func() { _, _ = io.Copy(io.Discard, guest) }()
	noErr(t, in.end(bound(t)))
	in.leave()
	wrote := make(chan error)
	go func() { _, err := io.WriteString(in, "next"); wrote <- err }()
	b, guest2 := net.Pipe()
	in.attach(b)
	readN(t, guest2, "next")
	noErr(t, <-wrote)
	in.park()
	in.leave()
	noErr(t, in.Close())
	if in.wanted() {
		t.Error("an ended stream wants a connection")
	}
}

// Short calls end before the connection goes, later ones wait for the next, long
// ones begin anew; when all has ended they fail.
func TestLink(t *testing.T) {
	l, ctx := newLink(), bound(t)
	connect := func() *ttrpc.Client {
		a, b := net.Pipe()
		t.Cleanup(func() { b.Close() })
		go func() { _, _ = io.Copy(io.Discard, b) }()
		return ttrpc.NewClient(a)
	}
	l.set(connect())
	p, err := l.get(ctx, true)
	noErr(t, err)
	held := make(chan error, 1)
	go func() { _, err := l.hold(ctx); held <- err }()
	for { // until it holds
		l.mu.Lock()
		shut := l.shut
		up := l.up
		l.mu.Unlock()
		if shut {
			_ = up
			break
		}
		select {
		case err := <-held:
			t.Fatalf("a call is under way, and the connection was given up: %v", err)
		default:
		}
	}
	l.done()
	noErr(t, <-held)
	next := make(chan error, 1)
	go func() {
		_, err := l.get(ctx, true)
		next <- err
	}()
	again := make(chan *peer, 2)
	go func() {
		_, err := long(ctx, l, func(p *peer) *peer { again <- p; return p }, &agentpb.WaitProcessRequest{},
			func(q *peer, _ context.Context, _ *agentpb.WaitProcessRequest) (*agentpb.WaitProcessResponse, error) {
				if q == p {
					return nil, ttrpc.ErrClosed
				}
				return &agentpb.WaitProcessResponse{}, nil
			})
		next <- err
	}()
	l.drop()
	if !l.moved(p) {
		t.Error("the old connection counts as the present one")
	}
	l.set(connect())
	noErr(t, <-next)
	noErr(t, <-next)
	l.close()
	l.close()
	if _, err := l.hold(ctx); !errors.Is(err, ttrpc.ErrClosed) {
		t.Errorf("hold after the end: %v", err)
	}
	parked := newLink()
	go parked.close()
	if _, err := parked.get(ctx, true); !errors.Is(err, ttrpc.ErrClosed) {
		t.Errorf("a call that waited for the end: %v", err)
	}
}

// A guest that does not end a connection is not waited for; what came is kept.
func TestCollectGivesUp(t *testing.T) {
	a, guest := net.Pipe()
	o := &outStream{stay: newStay(a)}
	o.park()
	ctx, cancel := context.WithCancel(bound(t))
	got := make(chan error)
	go func() { got <- o.collect(ctx) }()
	_, err := io.WriteString(guest, "came")
	noErr(t, err)
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Errorf("collect: %v", err)
	}
	go func() { _, _ = io.WriteString(guest, ", and more"); guest.Close() }()
	noErr(t, o.collect(bound(t)))
	o.drop()
	readN(t, o, "came, and more")
}

// A guest cannot have more kept than a stream has under way.
func TestCollectIsBounded(t *testing.T) {
	a, guest := net.Pipe()
	o := &outStream{stay: newStay(a)}
	o.park()
	go func() { _, _ = guest.Write(make([]byte, 2*maxKept)) }()
	if err := o.collect(bound(t)); !errors.Is(err, errTooMuch) || len(o.kept) > maxKept+1 {
		t.Errorf("%d bytes kept, %v", len(o.kept), err)
	}
}
