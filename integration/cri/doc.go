// SPDX-License-Identifier: Apache-2.0

// Package cri tests pods as Kubernetes makes them: through the CRI plugin of a
// private containerd, over its socket, with the client that the kubelet has. The
// tests need what make sets up, root, and real virtual machines.
//
// Each test is a function of one pod or of pods that it makes itself, and runs
// once for every mode: the Sandbox API, and a pause container.
package cri
