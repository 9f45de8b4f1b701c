// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"fmt"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/qemu"
	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/sandbox/network"
)

// containerTypeKey is set by containerd's CRI plugin on a container; on the first of a
// pod, for which it has made a network, it is "sandbox".
const containerTypeKey = "io.kubernetes.cri.container-type"

// connectNetwork connects the devices of the pod's network namespace and adds
// them to the machine's configuration.
func (s *Sandbox) connectNetwork(ctx context.Context, m *machine, vc *hypervisor.Config, pod PodConfig) error {
	n, err := network.Open(ctx, vc.Network.Path, network.Options{
		Model: network.Model(s.o.Config.Runtime.InternetworkingModel), Queues: queues(&s.o.Config.QEMU, vc.CPUs),
		NoVhost: s.o.Config.QEMU.DisableVhostNet, Required: pod.Networked, Ledger: s.o.Ledger, Log: s.o.Log,
		RxRate: uint64(s.o.Config.QEMU.RxRateLimiterMaxRate), TxRate: uint64(s.o.Config.QEMU.TxRateLimiterMaxRate),
	})
	if err != nil {
		return err
	}
	m.net = n
	if vc.NICs, err = n.NICs(); err != nil {
		return err
	}
	vc.HotplugPorts = hotplugPortsOf(s.o.Config)
	return nil
}

// maxQueues is the most queue pairs of a device that are chosen by the number of vCPUs.
const maxQueues = 16

// queues is the number of queue pairs of each network device of a machine with that many vCPUs.
func queues(q *config.QEMU, cpus int) int {
	if q.NetworkQueues > 0 {
		return q.NetworkQueues
	}
	return min(cpus, maxQueues)
}

// hotplugPortsOf is how many devices of all kinds a running machine can get.
func hotplugPortsOf(c *config.Config) int {
	if c.QEMU.MachineType == qemu.MicroVM {
		return 0
	}
	if c.Runtime.InternetworkingModel == string(network.None) {
		return diskPorts
	}
	return hotplugPorts + diskPorts
}

// alonePorts is how many devices a machine can have, or get, whose pod is one container: each
// port costs 1.6 MiB and 5 ms of every start (docs/decisions.md).
const alonePorts = 4

// portsBeside is how many ports a machine has beside those of its disks at boot:
// as many in all machines of a kind, which then have one template.
func portsBeside(vc *hypervisor.Config, alone bool) int {
	all := vc.HotplugPorts
	if alone {
		all = min(all, alonePorts)
	}
	if all == 0 {
		return 0
	}
	return max(all-len(vc.Disks), 1)
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
