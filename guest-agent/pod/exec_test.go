// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"context"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// TestExecKilledWhileLaunched: KILL reaches an exec that its caller has given up
// before it runs: its launch ends, or, where that is too late, the process does.
func TestExecKilledWhileLaunched(t *testing.T) {
	for name, late := range map[string]bool{"in time": false, "too late": true} {
		t.Run(name, func(t *testing.T) {
			p, w := newPod(t)
			c := run(t, p, "a", "exec sleep 100")
			launching := make(chan struct{})
			w.slow = func(ctx context.Context) error {
				close(launching)
				<-ctx.Done()
				if late {
					return nil
				}
				return context.Cause(ctx)
			}
			type result struct {
				pr  *Process
				err error
			}
			made := make(chan result, 1)
			go func() {
				pr, err := c.Exec(bound(t), "e", &agentpb.Process{Args: []string{"exec sleep 1000"}}, Ports{})
				made <- result{pr, err}
			}()
			<-launching
			if err := c.Signal("e", unix.SIGTERM); fault.KindOf(err) != fault.NotFound {
				t.Errorf("TERM: %v", err)
			}
			if err := c.Signal("e", unix.SIGKILL); err != nil {
				t.Errorf("KILL: %v", err)
			}
			r := <-made
			if late {
				if r.err != nil {
					t.Fatal(r.err)
				}
				if code, _, err := c.Wait(bound(t), "e"); code != 137 || err != nil {
					t.Errorf("exit code %d, %v", code, err)
				}
				return
			}
			if !errors.Is(r.err, errLaunchKilled) {
				t.Errorf("exec: %v", r.err)
			}
			if err := c.Signal("e", unix.SIGKILL); fault.KindOf(err) != fault.NotFound {
				t.Errorf("KILL of one that is gone: %v", err)
			}
		})
	}
}

// TestSignalAll: a signal without an exec id reaches every process, whatever it is.
func TestSignalAll(t *testing.T) {
	p, _ := newPod(t)
	c := run(t, p, "a", "exec sleep 1000")
	if _, err := c.Exec(bound(t), "e", &agentpb.Process{Args: []string{"exec sleep 1000"}}, Ports{}); err != nil {
		t.Fatal(err)
	}
	c.group = &growing{Group: c.group}
	if err := c.Signal("", unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"e", ""} {
		if code, _, err := c.Wait(bound(t), id); code != 128+15 || err != nil {
			t.Errorf("process %q: %d, %v", id, code, err)
		}
	}
}

// growing is a group in which all processes but one are forked after it was first listed.
type growing struct {
	Group
	listed bool
}

func (g *growing) Procs() ([]int, error) {
	pids, err := g.Group.Procs()
	if !g.listed && len(pids) > 1 {
		pids = pids[:1]
	}
	g.listed = true
	return pids, err
}
