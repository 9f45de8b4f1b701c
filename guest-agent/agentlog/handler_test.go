// SPDX-License-Identifier: Apache-2.0

package agentlog

import (
	"bytes"
	"errors"
	"log/slog"
	"math"
	"testing"
	"time"
)

// A line is the same, byte for byte, as slog's own handler writes it.
func TestLines(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 678900000, time.FixedZone("", 3600))
	for _, x := range []struct {
		msg   string
		level slog.Level
		at    time.Time
		args  []any
		plain bool
	}{
		{"agent ready", slog.LevelInfo, at, []any{"version", "dev", "t_ms", 12.345, "n", 0, "port", uint32(1024), "neg", -7}, true},
		{"numbers", LevelTrace, at, []any{"a", 0.0, "b", 1e-6, "c", 1e20, "d", 110.0, "e", 0.1, "max", uint64(math.MaxUint64)}, true},
		{"critical", LevelCritical, at, nil, true},
		{"html <&>", slog.LevelWarn, at, []any{"path", "/a b/<c>&d"}, true},
		{"text", slog.LevelError, at, []any{"err", "open \"/x\": no\tsuch"}, false},
		{"text", slog.LevelError, at, []any{"err", `a\b`}, false},
		{"umlaut ü", slog.LevelInfo, at, nil, false},
		{"bad\xff", slog.LevelInfo, at, []any{"k\x7f", 1}, false},
		{"small", slog.LevelInfo, at, []any{"f", 1e-7}, false},
		{"large", slog.LevelInfo, at, []any{"f", 1e21}, false},
		{"negative", slog.LevelInfo, at, []any{"f", -1.5}, false},
		{"none", slog.LevelInfo, at, []any{"f", math.NaN()}, false},
		{"other kinds", slog.LevelInfo, at, []any{"d", time.Second, "b", true, "e", errors.New("x"), "t", at}, false},
		{"group", slog.LevelInfo, at, []any{slog.Group("g", "a", 1), "", 2, slog.Group("empty")}, false},
		{"own keys", slog.LevelInfo, at, []any{"time", at}, false},
		{"own keys", slog.LevelInfo, at, []any{"level", slog.LevelInfo}, false},
		{"message again", slog.LevelInfo, at, []any{"msg", "two"}, true},
		{"other level", slog.LevelInfo + 1, at, nil, false},
		{"no time", slog.LevelInfo, time.Time{}, nil, false},
	} {
		r := slog.NewRecord(x.at, x.level, x.msg, 0)
		r.Add(x.args...)
		if _, ok := plainLine(r); ok != x.plain {
			t.Errorf("%q %v: plain is %v", x.msg, x.args, ok)
		}
		var got, want bytes.Buffer
		if err := (handler{sink: NewSink(&got), level: LevelTrace}).Handle(t.Context(), r); err != nil {
			t.Error(err)
		}
		if err := (handler{sink: NewSink(&want), level: LevelTrace}).full().Handle(t.Context(), r); err != nil {
			t.Error(err)
		}
		if got.String() != want.String() || got.Len() == 0 {
			t.Errorf("%q:\n got %s\nwant %s", x.msg, &got, &want)
		}
	}
}

func TestLevelsAndGroups(t *testing.T) {
	var out bytes.Buffer
	log := New(NewSink(&out), slog.LevelWarn)
	log.Info("dropped")
	log.With("a", 1).WithGroup("g").Info("dropped")
	if out.Len() != 0 {
		t.Errorf("below the level: %s", &out)
	}
	log.WithGroup("g").With("a", 1).Error("kept")
	if !bytes.Contains(out.Bytes(), []byte(`"level":"error","msg":"kept","g":{"a":1}}`)) {
		t.Errorf("got %s", &out)
	}
}
