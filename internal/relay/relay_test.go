// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"context"
	"io"
	"net"
	"testing"
)

// pair is a TCP connection, both ends.
func pair(t *testing.T) (one, other *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); d.Close() })
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

func join(t *testing.T, ctx context.Context, a, b net.Conn) <-chan struct{} {
	done := make(chan struct{})
	go func() { defer close(done); Join(ctx, a, b) }()
	t.Cleanup(func() { <-done })
	return done
}

// TestHalfClose: the answer still arrives after the question has ended.
func TestHalfClose(t *testing.T) {
	client, a := pair(t)
	b, server := pair(t)
	done := join(t, t.Context(), a, b)
	go func() { client.Write([]byte("question")); client.CloseWrite() }()
	if got, err := io.ReadAll(server); string(got) != "question" || err != nil {
		t.Fatalf("got %q, %v", got, err)
	}
	go func() { server.Write([]byte("answer")); server.CloseWrite() }()
	if got, err := io.ReadAll(client); string(got) != "answer" || err != nil {
		t.Fatalf("got %q, %v", got, err)
	}
	<-done
}

// TestEnds: a side that resets, a connection without halves and the context end both.
func TestEnds(t *testing.T) {
	t.Run("Reset", func(t *testing.T) {
		client, a := pair(t)
		b, server := pair(t)
		done := join(t, t.Context(), a, b)
		client.SetLinger(0)
		client.Close()
		<-done
		if _, err := server.Read(make([]byte, 1)); err == nil {
			t.Error("the server's connection is open")
		}
	})
	t.Run("Whole", func(t *testing.T) {
		client, a := net.Pipe()
		b, server := pair(t)
		done := join(t, t.Context(), a, b)
		server.CloseWrite()
		if _, err := client.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("got %v", err)
		}
		<-done
	})
	t.Run("Context", func(t *testing.T) {
		_, a := pair(t)
		b, _ := pair(t)
		ctx, cancel := context.WithCancel(t.Context())
		done := join(t, ctx, a, b)
		cancel()
		<-done
	})
}
