// SPDX-License-Identifier: Apache-2.0

package protocols

// The service on a shim's socket by which operators (kata-ctl) reach the guest of
// its pod. The messages are the agent's.
const (
	PodService        = "kata.Pod"
	MethodGetIPTables = "GetIPTables" // agentpb.GetIPTablesRequest
	MethodSetIPTables = "SetIPTables" // agentpb.SetIPTablesRequest
)
