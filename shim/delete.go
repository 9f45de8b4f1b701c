// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/sandbox/ledger"
)

// killedStatus is what containerd is told of a task whose shim was killed.
const killedStatus = 137

// remove is containerd's "delete": the daemon does not answer any more, so what
// it left is reaped. For the pod's own id a daemon that still lives is killed
// first; for a member of a pod it is left alone, since the others need it.
func remove(ctx context.Context, p *params, stdout io.Writer) error {
	root, key, own, err := locate(p)
	if err != nil {
		return err
	}
	report, err := ledger.Reap(ctx, root, key)
	if errors.Is(err, ledger.ErrAlive) && own {
		if err = killDaemon(ctx, root, key); err == nil {
			report, err = ledger.Reap(ctx, root, key)
		}
	}
	if err != nil && !errors.Is(err, ledger.ErrAlive) {
		return fmt.Errorf("%w (%d entries left)", err, len(report.Left))
	}
	out, err := proto.Marshal(&task.DeleteResponse{ExitStatus: killedStatus, ExitedAt: timestamppb.New(time.Now())})
	if err != nil {
		return err
	}
	_, err = stdout.Write(out)
	return err
}

// locate finds the pod's directory of a bundle: by the address that start wrote
// there, which a newer configuration cannot change, else as start would.
func locate(p *params) (root, key string, own bool, err error) {
	group := p.ID
	if spec, err := readSpec(p.Bundle); err == nil {
		if g, err := groupOf(spec, p.ID); err == nil {
			group = g
		}
	}
	key = ledger.Key(filepath.Join(filepath.Dir(p.Bundle), group))
	own = group == p.ID
	if data, err := os.ReadFile(filepath.Join(p.Bundle, "address")); err == nil {
		dir := filepath.Dir(strings.TrimPrefix(strings.TrimSpace(string(data)), "unix://"))
		if filepath.Base(dir) == key {
			return filepath.Dir(dir), key, own, nil
		}
	}
	cfg, _, err := config.Load(config.LoadOptions{})
	if err != nil {
		return "", "", false, err
	}
	return cfg.Runtime.StateDir, key, own, nil
}

// killDaemon ends a daemon that does not answer, and its children with it.
func killDaemon(ctx context.Context, root, key string) error {
	infos, err := ledger.List(root)
	if err != nil {
		return err
	}
	for _, i := range infos {
		if i.Key != key || !i.Alive {
			continue
		}
		fd, err := unix.PidfdOpen(i.Meta.Shim.PID, 0)
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("kill the shim (pid %d): %w", i.Meta.Shim.PID, err)
		}
		defer unix.Close(fd)
		if start, err := ledger.StartTime(i.Meta.Shim.PID); err != nil || start != i.Meta.Shim.Start {
			return nil // another process by now
		}
		if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill the shim (pid %d): %w", i.Meta.Shim.PID, err)
		}
		return waitPidfd(ctx, fd)
	}
	return nil
}

// waitPidfd waits until the process behind a pidfd is gone, at most five seconds.
func waitPidfd(ctx context.Context, fd int) error {
	limit := time.Now().Add(5 * time.Second)
	if d, ok := ctx.Deadline(); ok && d.Before(limit) {
		limit = d
	}
	for {
		left := time.Until(limit)
		if left <= 0 {
			return errors.New("the shim does not die")
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if n > 0 {
			return nil
		}
	}
}
