// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/protocols/agentpb"
)

// How the guest's clock follows the host's.
const (
	// clockAccuracy is how far the guest's clock may be off after it was set.
	clockAccuracy = 10 * time.Millisecond
	// clockTries bounds the calls of one setting: while the guest starts
	// containers each takes longer than that.
	clockTries = 5
	// clockInterval is between two settings for the drift of the guest's own
	// clock; clockSoon after one that was not accurate.
	clockInterval = time.Minute
	clockSoon     = time.Second
	clockTimeout  = 10 * time.Second
)

// keepClock gives the guest the host's time: at once, since its own clock starts
// at whole seconds, from time to time, and when the host's clock is set or the
// host has slept.
func (m *machine) keepClock() {
	w, err := watchClock()
	if err != nil {
		m.log.Warn("the guest's clock will not follow when the host's is set", "error", err)
	} else {
		defer w.close()
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-timer.C:
		case <-w.jumped():
		}
		next := clockInterval
		if !m.setClock() {
			next = clockSoon
		}
		timer.Reset(next)
	}
}

// setClock sets the guest's clock and tells whether that was accurate, or never will be.
func (m *machine) setClock() bool {
	ctx, cancel := context.WithTimeout(m.ctx, clockTimeout)
	defer cancel()
	var way time.Duration // what a call takes to the guest, guessed of the quickest one
	for try := range clockTries {
		sent := time.Now()
		t := sent.Add(way)
		_, err := m.agent.SetGuestDateTime(ctx, &agentpb.SetGuestDateTimeRequest{Sec: t.Unix(), Usec: int64(t.Nanosecond() / 1000)})
		if err != nil {
			if m.ctx.Err() == nil {
				m.log.Warn("set the guest's clock", "error", m.agent.Err(err))
			}
			return true
		}
		// The guest has set its clock at some time of the call.
		trip := time.Since(sent)
		if max(way, trip-way) <= clockAccuracy {
			return true
		}
		if try == 0 || trip/2 < way {
			way = trip / 2
		}
	}
	return false
}

// clockWatch tells when the host's clock was set.
type clockWatch struct {
	f    *os.File
	set  chan struct{} // holds at most one jump that nobody has taken
	done chan struct{} // closed when the reader has ended
}

// watchClock watches by a timer that is far away and cancelled by a jump
// (timerfd_create(2), TFD_TIMER_CANCEL_ON_SET); it costs nothing until then.
func watchClock() (*clockWatch, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_REALTIME, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch the clock: %w", err)
	}
	if err := armClock(fd); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("watch the clock: %w", err)
	}
	w := &clockWatch{f: os.NewFile(uintptr(fd), "clock"), set: make(chan struct{}, 1), done: make(chan struct{})}
	go w.read(fd)
	return w, nil
}

// armClock sets a timer that never rings: 2^40 s after 1970.
func armClock(fd int) error {
	return unix.TimerfdSettime(fd, unix.TFD_TIMER_ABSTIME|unix.TFD_TIMER_CANCEL_ON_SET, &unix.ItimerSpec{Value: unix.Timespec{Sec: 1 << 40}}, nil)
}

func (w *clockWatch) read(fd int) {
	defer close(w.done)
	var b [8]byte
	for {
		if _, err := w.f.Read(b[:]); !errors.Is(err, unix.ECANCELED) {
			return // closed
		}
		if err := armClock(fd); err != nil {
			return
		}
		select {
		case w.set <- struct{}{}:
		default:
		}
	}
}

// jumped yields after the clock was set; nil, which never yields, without a watch.
func (w *clockWatch) jumped() <-chan struct{} {
	if w == nil {
		return nil
	}
	return w.set
}

func (w *clockWatch) close() {
	w.f.Close()
	<-w.done
}
