// SPDX-License-Identifier: Apache-2.0

// Package cluster runs a Kubernetes of one node for a test: etcd, API server,
// controller manager, scheduler, kubelet and kube-proxy, built by
// scripts/kubernetes.sh, beside the lab's containerd with the shim under test.
//
//	cluster.Enter()                      // first thing in TestMain
//	c, err := cluster.Start(ctx, cluster.Options{Build: build})
//	defer c.Stop(ctx)
//	r, err := c.Kubectl(ctx, "get", "pods")
//
// Nothing of it touches the machine: all programs run in the lab's network
// namespace, which they take for the host's, and Enter gives the calling program
// a mount namespace in which /run, /var/lib and /var/log are empty directories
// of its own. Cgroups are below one of the cluster's own.
package cluster
