// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox/agentclient"
	"github.com/kata-v2/kata/sandbox/storage"
)

// deferRemoval leaves a stopped container in the guest: to the machine's end, to the
// next container, or to a checkpoint. That is for the last one, unless the pod
// exists without containers too, and for each that leaves nothing there but a few
// files, so that the end of a pod does not wait for their removal one by one.
func (s *Sandbox) deferRemoval(c *Container) bool {
	light := c.leavesLittle()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.containers[c.id] != c {
		return false
	}
	if last := len(s.containers) == 1 && s.pod == nil; !last && !light {
		return false
	}
	s.leftInGuest = append(s.leftInGuest, c)
	return true
}

// leavesLittle tells whether the guest holds nothing for the stopped container that
// the host waits for (a disk), that is of any size (a volume of the guest's own), or
// that others see (hooks at its end). What it knows of the share is forgetShare's.
func (c *Container) leavesLittle() bool {
	return len(c.volumes) == 0 && len(c.direct) == 0 && !c.s.disks.Holds(c.id) && c.s.o.Config.QEMU.GuestHookPath == ""
}

// clearGuest removes what deferRemoval left.
func (s *Sandbox) clearGuest(ctx context.Context) error {
	s.mu.Lock()
	left := s.leftInGuest
	s.leftInGuest = nil
	s.mu.Unlock()
	for i, c := range left {
		if err := s.removeInGuest(ctx, c); err != nil {
			s.mu.Lock()
			s.leftInGuest = append(s.leftInGuest, left[i:]...)
			s.mu.Unlock()
			return err
		}
	}
	return nil
}

// removeInGuest is nothing for a machine that has ended or a container it does not know.
func (s *Sandbox) removeInGuest(ctx context.Context, c *Container) error {
	m, err := s.running()
	if err != nil {
		return nil //nolint:nilerr // nothing runs, so nothing is left there
	}
	_, err = m.agent.RemoveContainer(ctx, &agentpb.RemoveContainerRequest{ContainerId: c.guest})
	if err = m.agent.Err(err); err != nil && !errors.Is(err, agentclient.ErrGone) && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove container: %w", err)
	}
	return s.detach(ctx, c.id)
}

// unshare takes what the container has in the share out of it.
func (c *Container) unshare(share *storage.Share) error {
	held := share.Holds(c.id)
	err := share.Remove(c.id)
	if m, gone := c.s.running(); held && gone == nil {
		m.forgetShare()
	}
	return err
}

// forgetDelay is how long the guest goes on knowing files that have left the share:
// most often the machine ends before, and several containers go together.
const forgetDelay = time.Second

// forgetShare has the guest let go of what the host has taken out of the share: the
// daemon has each file open that the guest knows, so the host could not use the
// space of a container's root again, nor a volume's device, as long as the pod lives.
func (m *machine) forgetShare() {
	if m.ending() || !m.forgetting.CompareAndSwap(false, true) {
		return
	}
	m.work(func() {
		delay := time.NewTimer(forgetDelay)
		defer delay.Stop()
		select {
		case <-delay.C:
		case <-m.ctx.Done():
			return
		}
		m.forgetting.Store(false)
		_, err := m.agent.RemoveStaleVirtiofsShareMounts(m.ctx, &agentpb.RemoveStaleVirtiofsShareMountsRequest{})
		if err = m.agent.Err(err); err != nil && !m.ending() && !errdefs.IsNotImplemented(err) {
			m.log.Warn("the guest may still know files that are no more shared", "error", err)
		}
	})
}
