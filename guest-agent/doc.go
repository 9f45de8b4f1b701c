// SPDX-License-Identifier: Apache-2.0

// Package guestagent is PID 1 of the guest: it boots user space, serves the
// agent protocol (package protocols) over vsock, and runs the pod's containers
// through an OCI engine.
//
// Start:
//
//	kernel --> Mount --> boot modules --> listen 1024, 1027 --> ready dial --> fs modules
//	                                      \__ serving from here on             (others on demand)
//
// Sandbox, container, process (package pod enforces these):
//
//	empty --CreateSandbox--> active --DestroySandbox--> empty
//
//	absent --CreateContainer--> created --StartContainer--> running <--Pause/Resume--> paused
//	                               |                           |                          |
//	                               +-------- init gone ------->+---> stopped <------------+
//	absent <--RemoveContainer (any state: what still runs is killed)----+
//
//	absent --Create/ExecProcess--> live --reaped--> exited --waited for, output drained--> absent
//
// Rules that hold everywhere:
//
//   - The reaper alone collects children. A process's exit is what it saw, never
//     the end of a stream; WaitProcess answers at once though a descendant may
//     hold stdout open.
//   - A stream connection is closed by the guest when the process's end of the
//     pipe has no holder left and every byte was written to the connection.
//   - Signals go through pidfds, so never to a process that only has the number.
//     TERM is never turned into KILL; KILL with an empty exec_id is cgroup.kill.
//   - What is a file of the cgroup is done here; the OCI engine is started inside
//     the container's cgroup and is told to leave cgroups alone.
//   - No lock is held across a system call that can block, an engine call or I/O.
//     Every goroutine has an owner that waits for it.
//
// Packages: boot (mounts, modules, command line), reaper, streams, engine,
// cgroups, ocispec, storage, devices, network, pod (state), rpc (edge),
// forward, vsocket, agentlog, fault.
package guestagent
