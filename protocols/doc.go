// SPDX-License-Identifier: Apache-2.0

// Package protocols is the wire between the shim on the host and the agent in
// the guest: the .proto files beside this one, the Go code generated from them
// (agentpb, typespb), and the constants both sides share.
//
// The transport is ttrpc over vsock. The agent listens on AgentPort. Everything
// that is not an RPC travels on a connection of its own:
//
//   - ready: the guest dials the host port named by ParamReadyPort the moment it
//     serves RPCs, and closes the connection again; nothing is written.
//   - stdio: before CreateContainer or ExecProcess the host dials StdioPort once
//     for each stream that it wants and names its own source port of that
//     connection in the request (stdin_port, stdout_port, stderr_port; 0 means no
//     stream). The guest pairs the two by the peer port it sees. stdin flows host
//     to guest and ends when the host shuts its write side; stdout and stderr flow
//     guest to host and end when the guest closes. A terminal uses stdin and
//     stdout only. A transport that cannot show source ports writes
//     StreamIDMagic followed by its identity as a 32-bit little-endian number as
//     the first eight bytes of the connection and names that number instead.
//   - logs: the agent listens on LogPort and writes JSON lines to whoever connects.
//   - forwards (FeatureTCPForward): the host dials ForwardPort and writes a header
//     of six bytes: "KFWD" and a TCP port, little endian. The guest connects to that
//     port of 127.0.0.1, or of ::1 when that one refuses, and answers one byte: 0, or
//     the errno of Linux that says why not, after which it closes. After a 0 the two
//     connections are one: bytes and the end of either direction pass both ways. At
//     most MaxForwards at a time; one more is answered EAGAIN.
package protocols

// vsock ports of the guest (agent-protocol facts of Kata Containers 4.1, part B).
const (
	// AgentPort is the guest's ttrpc port.
	AgentPort = 1024
	// LogPort is where the guest serves its log as JSON lines.
	LogPort = 1025
	// DebugConsolePort is where the guest serves a shell on a pty, when enabled.
	DebugConsolePort = 1026
	// StdioPort is where the guest accepts one connection for each stdio stream.
	StdioPort = 1027
	// ForwardPort is where the guest accepts connections to TCP ports of its
	// loopback. An addition of ours; upstream's agents refuse it.
	ForwardPort = 1028
)

// StreamIDMagic opens a stdio connection whose transport has no source ports;
// the stream's identity follows as 32 bits, little endian.
const StreamIDMagic = "KSID"

// Kernel command line parameters read by the agent.
const (
	// ParamReadyPort names the host vsock port that the guest dials once it serves.
	ParamReadyPort = "agent.ready_port"
	// ParamLogLevel is the least level that is logged: critical, error, warn, info, debug, trace.
	ParamLogLevel = "agent.log"
	// ParamLogPort makes the agent serve its log on this vsock port instead of the console.
	ParamLogPort = "agent.log_vport"
	// ParamStdioPort is the vsock port for stdio streams; 0 or absent turns streams off.
	ParamStdioPort = "agent.passfd_listener_port"
	// ParamChannel names the virtio-serial port that carries every stream in place
	// of vsock. An addition of ours, for machines that are saved and restored.
	ParamChannel = "agent.channel"
	// ParamServerAddr is the ttrpc listen address, "vsock://-1:1024" by default.
	ParamServerAddr = "agent.server_addr"
	// ParamDebugConsole turns the debug console on.
	ParamDebugConsole = "agent.debug_console"
	// ParamDebugConsolePort is the console's vsock port; 0 means /dev/console.
	ParamDebugConsolePort = "agent.debug_console_vport"
	// ParamHotplugTimeout bounds the wait for a device's uevent, in seconds.
	ParamHotplugTimeout = "agent.hotplug_timeout"
	// ParamPipeSize sets the size of stdio pipes, in bytes; 0 keeps the kernel's default.
	ParamPipeSize = "agent.container_pipe_size"
	// ParamLaunchTimeout bounds the start of a process, in seconds.
	ParamLaunchTimeout = "agent.launch_process_timeout"
)

// Features are announced in AgentDetails.extra_features by an agent that has them.
const (
	FeatureReadyDial    = "ready-dial"
	FeatureStdioStreams = "stdio-streams"
	// FeaturePIDs says that CreateContainer and ExecProcess answer the process's
	// number in the guest.
	FeaturePIDs = "pids"
	// FeatureSyncedFiles says that the guest serves the service kata.Files.
	FeatureSyncedFiles = "synced-files"
	// FeatureUnified says that the guest holds LinuxResources.unified.
	FeatureUnified = "unified-limits"
	// FeatureTCPForward says that the guest listens on ForwardPort.
	FeatureTCPForward = "tcp-forward"
	// FeatureCheckpoint says that the guest serves the service kata.Checkpoint.
	FeatureCheckpoint = "checkpoint"
)

// AnnotationPrivate lists, in a container's specification, the namespaces of its
// pod that it does not share: "ipc", "uts" or "ipc,uts". An addition of ours: the wire
// carries no paths, by which a specification says that it does share, and an agent
// that does not know it shares them.
const AnnotationPrivate = "io.katacontainers.private_namespaces"

// Guest paths (agent-protocol facts, part F).
const (
	// GuestRunDir is the base of everything the agent keeps for containers.
	GuestRunDir = "/run/kata-containers"
	// GuestSharedDir is where the virtio-fs share SharedTag is mounted.
	GuestSharedDir = GuestRunDir + "/shared/containers"
	// PodSharePrefix begins the names in GuestSharedDir of directories that containers
	// of the pod share; those of containers begin with the container's id.
	PodSharePrefix = ".pod"
	// GuestSandboxDir holds what belongs to the pod as a whole.
	GuestSandboxDir = GuestRunDir + "/sandbox"
	// GuestShmDir is the pod's /dev/shm.
	GuestShmDir = GuestSandboxDir + "/shm"
	// GuestSyncedDir holds the volumes of the service kata.Files, in the guest's memory.
	GuestSyncedDir = GuestSandboxDir + "/synced"
	// SharedTag is the tag of the pod's virtio-fs share.
	SharedTag = "kataShared"
)
