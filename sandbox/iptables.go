// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"

	"github.com/kata-v2/kata/protocols/agentpb"
)

// IPTables are the rules of the packet filter in the guest, as iptables-save(8)
// prints them; what the guest answers is as untrusted as its console. An agent whose
// image has no tool answers Unimplemented.
func (s *Sandbox) IPTables(ctx context.Context, r *agentpb.GetIPTablesRequest) (*agentpb.GetIPTablesResponse, error) {
	m, err := s.running()
	if err != nil {
		return nil, err
	}
	resp, err := m.agent.GetIPTables(ctx, r)
	return resp, m.agent.Err(err)
}

// SetIPTables replaces the rules of the tables that the data names.
func (s *Sandbox) SetIPTables(ctx context.Context, r *agentpb.SetIPTablesRequest) (*agentpb.SetIPTablesResponse, error) {
	m, err := s.running()
	if err != nil {
		return nil, err
	}
	resp, err := m.agent.SetIPTables(ctx, r)
	return resp, m.agent.Err(err)
}
