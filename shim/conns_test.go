// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"
)

func TestTrackingListener(t *testing.T) {
	inner, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	must(t, err)
	l := &trackingListener{Listener: inner}
	defer l.Close()
	l.wait(bounded(t)) // nothing was accepted yet
	var accepted [2]net.Conn
	for i := range accepted {
		client, err := net.Dial("unix", inner.Addr().String())
		must(t, err)
		defer client.Close()
		accepted[i], err = l.Accept()
		must(t, err)
	}
	must(t, accepted[0].Close())
	_ = accepted[0].Close() // counts once
	done := make(chan struct{})
	go func() { defer close(done); l.wait(context.Background()) }()
	select {
	case <-done:
		t.Fatal("wait returned while a connection was open")
	case <-time.After(20 * time.Millisecond): // that it does not come shows in time only
	}
	must(t, accepted[1].Close())
	select {
	case <-done:
	case <-time.After(limit):
		t.Fatal("wait does not return")
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	client, err := net.Dial("unix", inner.Addr().String())
	must(t, err)
	defer client.Close()
	_, err = l.Accept()
	must(t, err)
	l.wait(ended)
}
