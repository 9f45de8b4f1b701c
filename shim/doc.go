// SPDX-License-Identifier: Apache-2.0

// Package shim is containerd's door: the only room that knows containerd's types.
//
//	containerd ── exec "start" ──▶ start: reads the bootstrap parameters, takes or
//	    ▲                          finds the sandbox's ledger, listens, forks the
//	    │  address                 daemon, prints the address, exits
//	    └───────────────────────────┘
//	containerd ── ttrpc: Task v2 / v3 ──▶ daemon (one for each pod, in a mount
//	    ▲                                 namespace of its own)
//	    └── ttrpc: Events.Forward ──────────┘
//	containerd ── exec "delete" ──▶ reaps what a dead daemon left
//
// Both versions of the Task service have the same messages on the wire, so one
// implementation on the types of v3 serves both names. Errors carry errdefs
// kinds inside and become gRPC status codes in one place, serve.go.
package shim
