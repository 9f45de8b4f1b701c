// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/sandbox/network"
)

// containerTypeKey is set by containerd's CRI plugin on a container that it made
// a network for.
const containerTypeKey = "io.kubernetes.cri.container-type"

// requiresNetwork tells whether somebody has set up a network for the pod before
// its machine starts: a namespace without a device is a mistake then.
func requiresNetwork(p PodConfig) bool {
	return p.NetNSPath != "" && p.Annotations[containerTypeKey] == "sandbox"
}

// connectNetwork connects the devices of the pod's network namespace and adds
// them to the machine's configuration.
func (s *Sandbox) connectNetwork(ctx context.Context, m *machine, vc *hypervisor.Config, required bool) error {
	n, err := network.Open(ctx, vc.Network.Path, network.Options{
		Model: network.Model(s.o.Config.Runtime.InternetworkingModel), Queues: 1,
		Required: required, Ledger: s.o.Ledger, Log: s.o.Log,
	})
	if err != nil {
		return err
	}
	m.net = n
	vc.NICs, err = n.NICs()
	return err
}

func closeNICs(nics []hypervisor.NIC) {
	for _, n := range nics {
		n.Close()
	}
}
