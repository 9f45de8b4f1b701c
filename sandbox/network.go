// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"fmt"

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
	if vc.NICs, err = n.NICs(); err != nil {
		return err
	}
	if s.o.Config.Runtime.InternetworkingModel != string(network.None) {
		vc.HotplugPorts = hotplugPorts
	}
	return nil
}

// hotplugPorts is how many network devices a running machine can get.
const hotplugPorts = 4

// watchNetwork follows the pod's namespace as long as the machine runs. A machine
// without a given namespace has one that somebody may wire later (Docker does so
// after the task's creation).
func (m *machine) watchNetwork() error {
	if err := m.net.Follow(fmt.Sprintf("/proc/%d/ns/net", m.vm.Info().PID)); err != nil {
		return err
	}
	m.work(func() { m.net.Watch(m.ctx, m.vm, m.agent) })
	return nil
}

func closeNICs(nics []hypervisor.NIC) {
	for _, n := range nics {
		n.Close()
	}
}
