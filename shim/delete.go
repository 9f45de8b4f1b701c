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

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/protocols/taskpb"
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
		if err = endDaemon(ctx, root, key); err == nil {
			report, err = ledger.Reap(ctx, root, key)
		}
	}
	if err != nil && !errors.Is(err, ledger.ErrAlive) {
		return fmt.Errorf("%w (%d entries left)", err, len(report.Left))
	}
	out, err := proto.Marshal(&taskpb.DeleteResponse{ExitStatus: killedStatus, ExitedAt: timestamppb.New(time.Now())})
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

// dyingTime is how long a daemon whose socket has closed may take to be gone.
const dyingTime = 2 * time.Second

// killTime bounds the wait for a killed daemon.
const killTime = 2 * time.Second

// endDaemon waits for a daemon that is about to end, and kills one that is not,
// its children with it. Both bounds fit into the five seconds that containerd
// gives to delete (core/runtime/v2/shim.go, cleanupTimeout).
func endDaemon(ctx context.Context, root, key string) error {
	wctx, cancel := context.WithTimeout(ctx, dyingTime)
	defer cancel()
	if err := ledger.WaitDead(wctx, root, key); !errors.Is(err, ledger.ErrAlive) {
		return err
	}
	kctx, cancel := context.WithTimeout(ctx, killTime)
	defer cancel()
	return ledger.KillShim(kctx, root, key)
}
