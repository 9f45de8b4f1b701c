// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"log/slog"
	"testing"
)

func TestParseGuestLine(t *testing.T) {
	for line, want := range map[string]struct {
		level slog.Level
		msg   string
		attrs int
	}{
		`{"ts":"x","level":"warn","msg":"m","cid":"c","err":"e"}`: {slog.LevelWarn, "m", 2},
		`{"level":"info","msg":"m"}`:                              {slog.LevelDebug, "m", 0},
		`{"level":7,"msg":{}}`:                                    {slog.LevelDebug, "", 0},
		`not JSON`:                                                {slog.LevelDebug, "not JSON", 0},
		`null`:                                                    {slog.LevelDebug, "", 0},
	} {
		level, msg, attrs := parseGuestLine([]byte(line))
		if level != want.level || msg != want.msg || len(attrs) != want.attrs {
			t.Errorf("%s: %v %q %v", line, level, msg, attrs)
		}
	}
}
