// SPDX-License-Identifier: Apache-2.0

package sandbox

import "github.com/kata-v2/kata/sandbox/portforward"

// forwardPorts takes connections to the loopback of the pod's namespace to the
// guest's, as long as the machine runs. A pod without a namespace of its own has
// nobody who would make some. A kernel that cannot do it costs the pod that, and
// nothing else.
func (m *machine) forwardPorts(namespace string) {
	if namespace == "" {
		return
	}
	f, err := portforward.Open(namespace, portforward.Options{Dial: m.vm.Dial, Log: m.log})
	if err != nil {
		m.log.Warn("ports of the pod cannot be forwarded", "error", err)
		return
	}
	if !m.work(func() { f.Serve(m.ctx) }) {
		f.Close()
	}
}
