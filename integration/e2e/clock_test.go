// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"os"
	"strconv"
	"strings"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"golang.org/x/sys/unix"
)

// The guest's clock is at most clockBar off, a second after it had to be set at
// the latest.
const (
	clockBar  = 10 * time.Millisecond
	clockSoon = time.Second
)

// clock reads the guest's clock through a shell that answers each line with the time.
type clock struct {
	b   *box
	in  *os.File
	out *bufio.Reader
}

// off is how far the guest's clock is ahead of ours: the truth is within bound of it.
func (c *clock) off() (off, bound time.Duration) {
	c.b.Helper()
	for i := range 20 {
		sent := time.Now()
		if _, err := c.in.WriteString("\n"); err != nil {
			c.b.Fatal(err)
		}
		line, err := c.out.ReadString('\n')
		if err != nil {
			c.b.Fatal(err)
		}
		trip := time.Since(sent)
		sec, frac, _ := strings.Cut(strings.TrimSpace(line), ".")
		s, err1 := strconv.ParseInt(sec, 10, 64)
		us, err2 := strconv.ParseInt(frac, 10, 64)
		if err1 != nil || err2 != nil {
			c.b.Fatalf("the guest's time %q", line)
		}
		if i == 0 || trip/2 < bound {
			off, bound = time.Unix(s, us*1000).Sub(sent.Add(trip/2)), trip/2
		}
	}
	return off, bound
}

// testClock: the guest's clock is the host's from the start, and is again soon
// after the host's was set. It is the guest's that jumps here; the host's is set
// by one nanosecond.
func testClock(b *box) {
	ctx, s := calls(b.T), b.dialShim(podID)
	set := member(b.T, "date", "-s", "@1000000000")
	caps := []string{"CAP_SYS_TIME"}
	set.Process.Capabilities.Bounding, set.Process.Capabilities.Effective, set.Process.Capabilities.Permitted = caps, caps, caps
	io := newPipes(b.T)
	in, out := open(b.T, io.stdin, os.O_RDWR), open(b.T, io.stdout, os.O_RDWR)
	defer in.Close()
	defer out.Close()
	x := s.exec(ctx, podID, process("sh", "-c", "while read x; do echo $EPOCHREALTIME; done"), pipes{stdin: io.stdin, stdout: io.stdout})
	if _, err := s.Start(ctx, &task.StartRequest{ID: podID, ExecID: x}); err != nil {
		b.Fatal(err)
	}
	c := &clock{b, in, bufio.NewReader(out)}
	off, bound := c.off()
	b.Logf("the guest's clock is %v ± %v ahead", off, bound)
	if off.Abs()-bound > clockBar {
		b.Errorf("the guest's clock is %v off, ± %v; want at most %v", off, bound, clockBar)
	}
	b.runSpec("setclock", set)
	if off, _ := c.off(); off > -time.Hour {
		b.Fatalf("the guest's clock is %v ahead after it was set back by years", off)
	}
	tx := unix.Timex{Modes: unix.ADJ_SETOFFSET | unix.ADJ_NANO, Time: unix.Timeval{Usec: 1}}
	began := time.Now()
	if _, err := unix.ClockAdjtime(unix.CLOCK_REALTIME, &tx); err != nil {
		b.Fatal(err)
	}
	for {
		if off, bound = c.off(); off.Abs()-bound <= clockBar {
			b.Logf("right again after %v: %v ± %v", time.Since(began).Round(time.Millisecond), off, bound)
			break
		}
		if time.Since(began) > clockSoon {
			b.Errorf("the guest's clock is still %v off", off)
			break
		}
	}
	endExec(ctx, b, s, x)
}

// endExec kills an exec of the pod and forgets it.
func endExec(ctx context.Context, b *box, s *shimClient, x string) {
	b.Helper()
	if _, err := s.Kill(ctx, &task.KillRequest{ID: podID, ExecID: x, Signal: 9}); err != nil {
		b.Error(err)
	}
	if w, err := s.Wait(ctx, &task.WaitRequest{ID: podID, ExecID: x}); err != nil || w.ExitStatus != 128+9 {
		b.Errorf("wait: %v, %v; want status 137", w, err)
	}
	if _, err := s.Delete(ctx, &task.DeleteRequest{ID: podID, ExecID: x}); err != nil {
		b.Error(err)
	}
}
