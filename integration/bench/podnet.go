// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"syscall"
	"time"
)

// The rows of a pod's network, between the host and a server in the pod.
const (
	tcpRTT = "tcp-rtt"
	tcpIn  = "tcp-in"  // host to pod
	tcpOut = "tcp-out" // pod to host
)

// netServers is the script of a pod that answers: an echo, a sink and a source,
// on the ports below.
const netServers = "nc -ll -p 7001 -e cat & nc -ll -p 7002 -e sh -c 'cat >/dev/null' & nc -ll -p 7003 -e cat /dev/zero & wait"

const (
	echoPort, sinkPort, sourcePort = 7001, 7002, 7003
	// netBytes is what one sample of a rate moves; netTrips how often a byte goes
	// there and back for one sample of the round trip, the median.
	netBytes = 32 << 20
	netTrips = 100
)

// measureNetwork takes a sample of each of a pod's network rows. The bench is in
// the network that the pod's host has.
func (e *Env) measureNetwork(ctx context.Context, p *criPod, runtime string, add Add) error {
	status, err := e.cri.PodSandboxStatus(ctx, p.id, false)
	if err != nil {
		return err
	}
	ip := status.GetStatus().GetNetwork().GetIp()
	for _, m := range []struct {
		row  Row
		port int
		take func(net.Conn) (float64, error)
	}{
		{Row{tcpRTT, runtime, Milliseconds}, echoPort, echoTrips},
		{Row{tcpIn, runtime, MegabytesPerSecond}, sinkPort, send},
		{Row{tcpOut, runtime, MegabytesPerSecond}, sourcePort, fetch},
	} {
		conn, err := e.dialPod(ctx, fmt.Sprintf("%s:%d", ip, m.port))
		if err != nil {
			return fmt.Errorf("%s: %w", m.row.Name, err)
		}
		if err := conn.SetDeadline(time.Now().Add(streamTimeout)); err != nil {
			return errors.Join(err, conn.Close())
		}
		v, err := m.take(conn)
		if err := errors.Join(err, conn.Close()); err != nil {
			return fmt.Errorf("%s: %w", m.row.Name, err)
		}
		add(m.row, v)
	}
	return nil
}

// dialPod connects to a server of a pod, which may still be on its way.
func (e *Env) dialPod(ctx context.Context, address string) (conn net.Conn, err error) {
	for {
		ierr := e.c.InHostNet(func() error {
			conn, err = net.Dial("tcp4", address)
			return nil
		})
		if ierr != nil {
			return nil, ierr
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return conn, err
		}
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			return nil, err
		}
	}
}

// echoTrips is the median of a byte's way to an echo and back, in ms.
func echoTrips(c net.Conn) (float64, error) {
	var b [1]byte
	all := make([]time.Duration, 0, netTrips)
	for range netTrips {
		began := time.Now()
		if _, err := c.Write(b[:]); err != nil {
			return 0, err
		}
		if _, err := io.ReadFull(c, b[:]); err != nil {
			return 0, err
		}
		all = append(all, time.Since(began))
	}
	slices.Sort(all)
	return milliseconds(all[len(all)/2]), nil
}

// send is the rate of bytes to a sink, until it has taken the last.
func send(c net.Conn) (float64, error) {
	began := time.Now()
	if _, err := io.CopyN(c, zeros{}, netBytes); err != nil {
		return 0, err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return 0, err
	}
	if _, err := io.Copy(io.Discard, c); err != nil {
		return 0, err
	}
	return rate(netBytes, time.Since(began)), nil
}

// fetch is the rate of bytes from a source.
func fetch(c net.Conn) (float64, error) {
	began := time.Now()
	if _, err := io.CopyN(io.Discard, c, netBytes); err != nil {
		return 0, err
	}
	return rate(netBytes, time.Since(began)), nil
}

// rate is in units of 1,000,000 bytes in a second.
func rate(bytes int, took time.Duration) float64 { return float64(bytes) / 1e6 / took.Seconds() }

// zeros is a source that never ends.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}
