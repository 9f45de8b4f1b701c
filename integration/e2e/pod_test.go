// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"testing"
)

// podID is the first container of the pod that many tests share.
const podID = "pod"

// TestPod runs what needs a running container, or a container in a running
// machine, in one pod. Each part has its own leak check.
func TestPod(t *testing.T) {
	b := newBox(t)
	b.startSpec(podID, newSpec(t, "sleep", "100000").group(podID))
	for _, part := range []struct {
		name string
		test func(*box)
	}{
		{"ExitStatus", testExitStatus},
		{"Environment", testExecEnvironment},
		{"Stdin", testStdin},
		{"StdinAndOutputAtOnce", testEcho},
		{"ManyExecs", testManyExecs},
		{"ExecAsUser", testExecUser},
		{"MissingExecutable", testMissingExecutable},
		{"Terminal", testTerminal},
		{"InitTerminal", testInitTerminal},
		{"Pids", testPids},
		{"TaskAPI", testTaskAPI},
		{"Clock", testClock},
		{"Signals", testSignals},
		{"KillExec", testKillExec},
		{"Pause", testPause},
		{"DeleteWhileRunning", testDeleteWhileRunning},
		{"DeleteForce", testDeleteForce},
		{"LongOutput", testLongOutput},
		{"LongInput", testLongInput},
		{"Group", testGroup},
		{"Mounts", testMounts},
		{"FileMounts", testFileMounts},
		{"MountPoints", testMountPoints},
		{"RemovedRoot", testRemovedRoot},
		{"SameName", testSameName},
		{"RecursiveReadOnly", testRecursiveReadOnly},
		{"SyncedVolumes", testSyncedVolumes},
		{"WrittenFiles", testWrittenFiles},
		{"PodVolumes", testPodVolumes},
		{"SharedVolume", testSharedVolume},
		{"GroupDirectory", testGroupDirectory},
		{"Propagation", testPropagation},
		{"DirectVolume", testDirectVolume},
		{"BadVolumes", testBadVolumes},
		{"Shm", testShm},
		{"ReadOnlyRoot", testReadOnlyRoot},
		{"User", testUser},
		{"Capabilities", testCapabilities},
		{"Limits", testRlimits},
		{"Seccomp", testSeccomp}, {"PodNamespaces", testPodNamespaces},
		{"Paths", testPaths},
		{"Sysctl", testSysctl},
		{"Devices", testDevices},
		{"MissingDevice", testMissingDevice},
		{"IORate", testIORate},
		{"Resources", testResources},
		{"RefusedInPod", testRefusedInPod},
	} {
		t.Run(part.name, func(t *testing.T) { part.test(begin(t, b.c)) })
	}
}

// member is the specification of another container of the pod.
func member(t *testing.T, args ...string) *spec { return newSpec(t, args...).group(podID) }

// script is member for a shell script.
func script(t *testing.T, text string) *spec { return member(t, "sh", "-c", text) }
