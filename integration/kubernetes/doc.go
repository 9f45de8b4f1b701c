// SPDX-License-Identifier: Apache-2.0

// Package kubernetes checks the shim as the runtime of a Kubernetes node: real
// manifests through a real API server, scheduler and kubelet (package cluster),
// each check a subtest and a line of the table that is printed at the end and
// written to kubernetes.md in KATA_BUILD.
//
// `make test-k8s` runs it; it needs what scripts/kubernetes.sh makes. RUN selects
// checks as `go test -run` does, HANDLER runs them under another handler of the
// lab: kata-pause, or runc, which shows what of the harness works without the shim.
package kubernetes
