// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// maxGuestLine bounds a line of the guest's log; a longer one ends the copying.
const maxGuestLine = 16 << 10

// copyGuestLog puts the agent's log lines into ours until the machine ends. The
// agent's own debug level decides how much comes; what comes is data of the
// guest, and is written as such.
// After a checkpoint the guest is asked again, for what it has kept too.
func (m *machine) copyGuestLog() {
	for m.copyLogOnce() {
	}
}

// copyLogOnce copies the lines of one connection and tells whether another is to follow.
func (m *machine) copyLogOnce() (again bool) {
	conn, err := m.vm.Dial(m.ctx, protocols.LogPort)
	if err != nil {
		if !m.ending() {
			m.log.Debug("the guest serves no log", "error", err)
		}
		return false
	}
	stop := context.AfterFunc(m.ctx, func() { conn.Close() })
	defer stop()
	defer conn.Close()
	sc := bufio.NewScanner(conn)
	sc.Buffer(nil, maxGuestLine)
	for sc.Scan() {
		level, msg, attrs := parseGuestLine(sc.Bytes())
		m.log.LogAttrs(m.ctx, level, "guest: "+msg, attrs...)
	}
	err = sc.Err()
	if m.ending() || m.saves != nil && errors.Is(err, unix.ECONNRESET) {
		return !m.ending()
	}
	if err != nil {
		m.log.Warn("the guest's log ended", "error", err)
	}
	return false
}

// guestLevels maps the agent's level names; its info is our debug, as our own
// lines tell the story of a pod.
var guestLevels = map[string]slog.Level{"critical": slog.LevelError, "error": slog.LevelError, "warn": slog.LevelWarn}

// parseGuestLine reads a JSON line of the agent; any other line is its own message.
func parseGuestLine(line []byte) (slog.Level, string, []slog.Attr) {
	var fields map[string]any
	if err := json.Unmarshal(line, &fields); err != nil {
		return slog.LevelDebug, string(line), nil
	}
	level, _ := fields["level"].(string)
	msg, _ := fields["msg"].(string)
	delete(fields, "level")
	delete(fields, "msg")
	delete(fields, "ts")
	var attrs []slog.Attr
	for _, k := range slices.Sorted(maps.Keys(fields)) {
		attrs = append(attrs, slog.Any(k, fields[k]))
	}
	l, ok := guestLevels[level]
	if !ok {
		l = slog.LevelDebug
	}
	return l, msg, attrs
}

// watchOOM holds the one outstanding GetOOMEvent, which yields a container each
// time, until the machine ends. An agent that cannot do it is asked once.
func (m *machine) watchOOM(told func(container string)) {
	for {
		e, err := m.agent.GetOOMEvent(m.ctx, &agentpb.GetOOMEventRequest{})
		if err != nil {
			if !m.ending() {
				m.log.Warn("out-of-memory events of the guest", "error", m.agent.Err(err))
			}
			return
		}
		told(e.ContainerId)
	}
}
