// SPDX-License-Identifier: Apache-2.0

package tail

import (
	"strings"
	"testing"
)

func TestKeepsTheLastBytes(t *testing.T) {
	b := New(8)
	for _, s := range []string{"abc", "def", "ghi", "jklmnopqrstu", "v", "wxyz0"} {
		b.Write([]byte(s))
	}
	if got := b.String(); got != "stuvwxyz0"[1:] {
		t.Fatalf("got %q", got)
	}
}

func TestControlCharactersAreRemoved(t *testing.T) {
	b := New(64)
	b.Write([]byte("a\x1b[31mred\r\nb\xff\n"))
	if got := b.String(); strings.ContainsAny(got, "\x1b\r") || got != "a[31mred\nb?" {
		t.Fatalf("got %q", got)
	}
}
