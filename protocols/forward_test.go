// SPDX-License-Identifier: Apache-2.0

package protocols

import "testing"

func TestForwardHeader(t *testing.T) {
	if got := string(ForwardHeader(0x1f90)); got != "KFWD\x90\x1f" {
		t.Errorf("header %q", got)
	}
	for _, port := range []uint16{1, 8080, 65535} {
		if got, err := ParseForwardHeader(ForwardHeader(port)); got != port || err != nil {
			t.Errorf("%d: %d, %v", port, got, err)
		}
	}
	for _, bad := range []string{"", "KFWD\x01", "KFWD\x00\x00", "KFWX\x01\x00", "KFWD\x01\x00\x00"} {
		if _, err := ParseForwardHeader([]byte(bad)); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
