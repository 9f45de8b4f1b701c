// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// stopGrace is how long a program may take to end after SIGTERM.
const stopGrace = 20 * time.Second

// process is one program of the cluster, running in the node's network.
type process struct {
	name, log string // log is the path of its output
	cmd       *exec.Cmd
	done      chan struct{} // closed when it is gone
	err       error         // valid after done
}

// startProcess starts a program of bin with its output appended to a log file.
// inNet runs a function on a thread of the node's network that outlives the
// program, for the parent-death signal is tied to that thread.
func startProcess(inNet func(func() error) error, log string, cmd *exec.Cmd, name string) (*process, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cluster: %s: log: %w", name, err)
	}
	defer f.Close()
	cmd.Stdout, cmd.Stderr = f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	p := &process{name: name, log: log, cmd: cmd, done: make(chan struct{})}
	if err := inNet(cmd.Start); err != nil {
		return nil, fmt.Errorf("cluster: %s: %w", name, err)
	}
	go func() {
		defer close(p.done)
		p.err = cmd.Wait()
	}()
	return p, nil
}

// stop ends the program: SIGTERM, and after stopGrace SIGKILL, which is an error.
func (p *process) stop() error {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	timer := time.NewTimer(stopGrace)
	defer timer.Stop()
	select {
	case <-p.done:
		return nil
	case <-timer.C:
		_ = p.cmd.Process.Kill()
		<-p.done
		return fmt.Errorf("cluster: %s did not end within %v of SIGTERM", p.name, stopGrace)
	}
}

// serving waits until url answers 200. The programs tell nobody when they are
// ready, so they are asked; an end of the program ends the wait.
func (p *process) serving(ctx context.Context, client *http.Client, url string) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	last := errors.New("not asked yet")
	for {
		select {
		case <-p.done:
			return fmt.Errorf("cluster: %s ended before it served: %w; its last lines:\n%s", p.name, p.err, p.tail(15))
		case <-ctx.Done():
			return fmt.Errorf("cluster: %s does not serve %s: %w, last %w; its last lines:\n%s", p.name, url, ctx.Err(), last, p.tail(15))
		case <-tick.C:
		}
		if last = ask(ctx, client, url); last == nil {
			return nil
		}
	}
}

// askTime bounds one question.
const askTime = 5 * time.Second

func ask(ctx context.Context, client *http.Client, url string) error {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, resp.Status)
	}
	return nil
}

// tail is the end of the program's log.
func (p *process) tail(n int) string {
	data, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
