// SPDX-License-Identifier: Apache-2.0

package procstat

import (
	"os"
	"testing"
)

func TestField(t *testing.T) {
	text := "00-ff ---p 00000000 00:00 0 [rollup]\nRss:  900 kB\nPss:  123 kB\nPss_Anon: 1 kB\n"
	if n, err := Field(text, "Pss"); err != nil || n != 123 {
		t.Errorf("got %d, %v", n, err)
	}
	if _, err := Field(text, "Swap"); err == nil {
		t.Error("a line that is not there was read")
	}
}

func TestSelf(t *testing.T) {
	one, err := PSS(os.Getpid())
	if err != nil || one < 1<<20 || one > 1<<30 {
		t.Errorf("this process has %d bytes, %v", one, err)
	}
	if _, err := PSS(os.Getpid(), 1<<22); err == nil {
		t.Error("the memory of a process that does not exist was read")
	}
	before, err := CPUTime(os.Getpid())
	if err != nil || before <= 0 {
		t.Fatalf("CPU time %v, %v", before, err)
	}
	for n, after := 0, before; after <= before; n++ { // some work moves the clock
		if after, err = CPUTime(os.Getpid()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := CPUTime(1 << 22); err == nil {
		t.Error("the clock of a process that does not exist was read")
	}
}
