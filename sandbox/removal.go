// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox/agentclient"
)

// deferRemoval leaves a stopped container to the machine's end if it is the last
// one, unless the pod exists without containers too.
func (s *Sandbox) deferRemoval(c *Container) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.containers) != 1 || s.containers[c.id] != c || s.pod != nil {
		return false
	}
	s.leftInGuest = append(s.leftInGuest, c)
	return true
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
