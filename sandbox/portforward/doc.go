// SPDX-License-Identifier: Apache-2.0

// Package portforward takes connections to the loopback of a pod's network
// namespace on the host to the loopback of its guest.
//
//	containerd, in the pod's namespace            shim                        guest
//	connect 127.0.0.1:8080 ──> sk_lookup ──> listener ──vsock 1028──> agent ──> 127.0.0.1:8080
//
// That is how containerd serves the CRI's PortForward (internal/cri/server,
// portForward): it enters the namespace and connects to the port there, where
// with a machine nobody listens.
//
// All ports lead to one listener by a BPF program of the type sk_lookup (Linux
// 5.9, Documentation/bpf/prog_sk_lookup.rst): the kernel asks it which socket
// takes a connection to an address of the namespace, and it names the listener
// for TCP to 127.0.0.0/8 and ::1. Nothing is rewritten, so the accepted socket's
// own address is what the client asked for; neither netfilter nor its modules
// are needed; packets that are redirected to the guest's device never meet it;
// and it holds on to the namespace by a descriptor alone, so that it ends with
// the shim, killed or not.
//
// A process that listens on the loopback of this namespace is hidden by the
// program; a pod's namespace has none, as its workload is in the guest.
package portforward
