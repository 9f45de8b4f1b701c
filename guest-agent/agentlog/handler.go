// SPDX-License-Identifier: Apache-2.0

package agentlog

import (
	"context"
	"log/slog"
	"strconv"
	"time"
)

// handler writes the lines that a healthy guest has: plain text and numbers, no
// groups. Whatever else there is it leaves to slog's own handler, of which it writes
// the same bytes. A guest without KVM pays for code that it runs for the first
// time, and slog's way to a line is several hundred branches long.
type handler struct {
	sink  *Sink
	level slog.Level
}

// full is slog's own handler.
func (h handler) full() slog.Handler {
	return slog.NewJSONHandler(h.sink, &slog.HandlerOptions{Level: h.level, ReplaceAttr: rename})
}

// Enabled implements slog.Handler.
func (h handler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level }

// WithAttrs implements slog.Handler.
func (h handler) WithAttrs(attrs []slog.Attr) slog.Handler { return h.full().WithAttrs(attrs) }

// WithGroup implements slog.Handler.
func (h handler) WithGroup(name string) slog.Handler { return h.full().WithGroup(name) }

// Handle implements slog.Handler.
func (h handler) Handle(ctx context.Context, r slog.Record) error {
	line, ok := plainLine(r)
	if !ok {
		return h.full().Handle(ctx, r)
	}
	_, err := h.sink.Write(line)
	return err
}

// plainLine is the record's line, unless something in it is not plain.
func plainLine(r slog.Record) ([]byte, bool) {
	level, ok := levelName(r.Level)
	if !ok || r.Time.IsZero() || !plain(r.Message) {
		return nil, false
	}
	b := append(make([]byte, 0, 256), `{"ts":"`...)
	b = r.Time.UTC().AppendFormat(b, time.RFC3339Nano)
	b = append(b, `","level":"`...)
	b = append(b, level...)
	b = append(b, `","msg":"`...)
	b = append(b, r.Message...)
	b = append(b, '"')
	r.Attrs(func(a slog.Attr) bool {
		b, ok = appendPlain(b, a)
		return ok
	})
	return append(b, "}\n"...), ok
}

// appendPlain adds a key and its value, and tells whether both are plain.
func appendPlain(b []byte, a slog.Attr) ([]byte, bool) {
	// slog's handler treats these keys in a way of its own (rename).
	if a.Key == "" || a.Key == slog.TimeKey || a.Key == slog.LevelKey || !plain(a.Key) {
		return b, false
	}
	b = append(b, `,"`...)
	b = append(b, a.Key...)
	b = append(b, `":`...)
	switch v := a.Value; v.Kind() {
	case slog.KindString:
		s := v.String()
		b = append(b, '"')
		b = append(b, s...)
		return append(b, '"'), plain(s)
	case slog.KindInt64:
		return strconv.AppendInt(b, v.Int64(), 10), true
	case slog.KindUint64:
		return strconv.AppendUint(b, v.Uint64(), 10), true
	case slog.KindFloat64:
		f := v.Float64()
		// JSON's form has an exponent outside of this, and none for the rest.
		return strconv.AppendFloat(b, f, 'f', -1, 64), f == 0 || f >= 1e-6 && f < 1e21
	}
	return b, false
}

// plain says that a text is the same in JSON.
func plain(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			return false
		}
	}
	return true
}
