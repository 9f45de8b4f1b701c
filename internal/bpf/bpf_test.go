// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// long is a program that keeps the verifier busy for a while: 4,000 times r0 = 1.
func long() []Insn {
	prog := make([]Insn, 4000)
	for i := range prog {
		prog[i] = Insn{Code: unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_K, Imm: 1}
	}
	return append(prog, Insn{Code: unix.BPF_JMP | unix.BPF_EXIT})
}

// TestLoadUnderSignals sends the loading thread the signal of Go's scheduler all the time.
func TestLoadUnderSignals(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var stop atomic.Bool
	done := make(chan int)
	pid, tid := unix.Getpid(), unix.Gettid()
	go func() {
		n := 0
		for ; !stop.Load(); n++ {
			_ = unix.Tgkill(pid, tid, unix.SIGURG)
		}
		done <- n
	}()
	prog := long()
	for i := range 200 {
		fd, err := Load(unix.BPF_PROG_TYPE_CGROUP_DEVICE, 0, "test", prog)
		if err != nil {
			t.Errorf("load %d: %v", i, err)
			break
		}
		unix.Close(fd)
	}
	stop.Store(true)
	if n := <-done; n < 200 {
		t.Errorf("only %d signals were sent", n)
	}
}

func TestLoadErrors(t *testing.T) {
	if _, err := Load(unix.BPF_PROG_TYPE_CGROUP_DEVICE, 0, strings.Repeat("x", 16), long()); err == nil || !strings.Contains(err.Error(), "at most 15 bytes") {
		t.Errorf("a name of 16 bytes: %v", err)
	}
	endless := []Insn{{Code: unix.BPF_JMP | unix.BPF_JA, Off: -1}}
	if _, err := Load(unix.BPF_PROG_TYPE_CGROUP_DEVICE, 0, "test", endless); err == nil {
		t.Error("a program without an end was loaded")
	}
}
