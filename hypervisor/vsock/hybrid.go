// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	hybridClients = 256              // served at once
	hybridHello   = 10 * time.Second // for the request line
	hybridDial    = 60 * time.Second // for the guest's driver to come up and answer
)

// hybrid serves a Unix socket for tools outside of this process. A client writes
// "CONNECT <port>\n" and reads "OK <host port>\n"; from then on the socket is the
// stream. When the guest cannot be reached the socket closes without an answer.
type hybrid struct {
	dev    Device
	log    *slog.Logger
	l      *net.UnixListener
	ctx    context.Context // ends with the server
	cancel context.CancelFunc
	slots  chan struct{}
	wg     sync.WaitGroup
}

func listenHybrid(path string, dev Device, log *slog.Logger) (*hybrid, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("HybridPath: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("HybridPath: %w", err)
	}
	h := &hybrid{dev: dev, log: log, l: l, slots: make(chan struct{}, hybridClients)}
	h.ctx, h.cancel = context.WithCancel(context.Background())
	h.wg.Go(h.accept)
	return h, nil
}

// close removes the socket and waits for the clients' goroutines.
func (h *hybrid) close() {
	h.cancel()
	_ = h.l.Close()
	h.wg.Wait()
}

func (h *hybrid) accept() {
	for {
		c, err := h.l.AcceptUnix()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				h.log.Error("vsock: hybrid socket ended", "error", err)
			}
			return
		}
		select {
		case h.slots <- struct{}{}:
			h.wg.Go(func() {
				defer func() { <-h.slots }()
				if err := h.serve(c); err != nil {
					h.log.Debug("vsock: hybrid client", "error", err)
				}
			})
		default:
			_ = c.Close()
		}
	}
}

// serve handles one client to its end.
func (h *hybrid) serve(c *net.UnixConn) error {
	defer c.Close()
	stop := context.AfterFunc(h.ctx, func() { _ = c.Close() })
	defer stop()
	_ = c.SetReadDeadline(time.Now().Add(hybridHello))
	r := bufio.NewReaderSize(c, 64) // also bounds the request line
	line, err := r.ReadSlice('\n')
	if err != nil {
		return fmt.Errorf("request line: %w", err)
	}
	port, err := parseConnect(string(line))
	if err != nil {
		return err
	}
	_ = c.SetReadDeadline(time.Time{})
	ctx, cancel := context.WithTimeout(h.ctx, hybridDial)
	defer cancel()
	g, err := h.dev.Dial(ctx, port)
	if err != nil {
		return err
	}
	defer g.Close()
	if _, err := fmt.Fprintf(c, "OK %d\n", g.LocalAddr().(Addr).Port); err != nil {
		return err
	}
	return splice(c, r, g)
}

// parseConnect reads "CONNECT <port>\n"; case does not matter.
func parseConnect(line string) (uint32, error) {
	f := strings.Fields(line)
	if len(f) != 2 || !strings.EqualFold(f[0], "CONNECT") {
		return 0, fmt.Errorf("request %q; want \"CONNECT <port>\"", line)
	}
	port, err := strconv.ParseUint(f[1], 10, 32)
	if err != nil {
		return 0, fmt.Errorf("request %q: port: %w", line, err)
	}
	return uint32(port), nil
}

// splice carries both directions and their ends. r reads from c. An error in
// one direction ends both at once.
func splice(c *net.UnixConn, r io.Reader, g net.Conn) error {
	up := make(chan error, 1)
	go func() {
		_, err := io.Copy(g, r)
		if err == nil {
			err = g.(HalfCloser).CloseWrite()
		}
		if err != nil {
			_ = g.Close()
			_ = c.Close()
		}
		up <- err
	}()
	// onlyConn hides ReadFrom, which would need a descriptor on the other side.
	_, err := io.Copy(struct{ io.Writer }{c}, g)
	if err == nil {
		err = c.CloseWrite()
	}
	if err != nil || unwritable(g) {
		_ = g.Close()
		_ = c.Close()
	}
	return errors.Join(err, <-up)
}

// unwritable reports whether the guest has closed both directions: the client
// has no use for its own then, and would only find out by writing.
func unwritable(g net.Conn) bool {
	c, ok := g.(*conn)
	if !ok {
		return false
	}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	return c.gone
}
