// SPDX-License-Identifier: Apache-2.0

// Package pod is the sandbox inside the guest: its containers and their
// processes, in the order and with the rollback that the RPCs promise. It knows
// nothing of the wire but the messages' types; package rpc is the thin edge.
//
// Sandbox:
//
//	        CreateSandbox            DestroySandbox
//	empty ----------------> active ----------------> destroyed
//	  ^ containers may be created here too: single-container callers do
//
// Container:
//
//	          CreateContainer     StartContainer        PauseContainer
//	(absent) ----------------> created -----------> running <--------> paused
//	                              |                    |                  |
//	                              |      init ended    v                  |
//	                              +-----------------> stopped <-----------+
//	                                                   |    SignalProcess(KILL)
//	                       RemoveContainer, any state  v
//	                                               (absent)
//
// Process (init of a container, or an exec):
//
//	            engine made it          reaped             waited for and drained
//	launching ------------------> live -------> exited ---------------------------> (absent)
//
// An init stays until its container is removed. The exit of a process is what
// the kernel told the reaper and nothing else: output that a descendant still
// holds open goes on flowing afterwards, and ends by itself or with the container.
package pod
