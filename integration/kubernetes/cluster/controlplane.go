// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"net/http"

	"github.com/kata-v2/kata/integration/lab"
)

func (c *Cluster) startEtcd(ctx context.Context) error {
	p, err := c.run("etcd", "etcd", "--name=test", "--data-dir="+c.path("etcd"),
		"--listen-client-urls="+etcdURL, "--advertise-client-urls="+etcdURL,
		"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380", "--initial-cluster=test=http://127.0.0.1:2380",
		"--unsafe-no-fsync", // nothing of it outlives the run
	)
	if err != nil {
		return err
	}
	return p.serving(ctx, c.client, etcdURL+"/health")
}

func (c *Cluster) startAPIServer(ctx context.Context) error {
	pki := c.pki.file
	p, err := c.run("bin", "kube-apiserver",
		"--etcd-servers="+etcdURL, "--bind-address=0.0.0.0", "--secure-port=6443", "--advertise-address="+lab.HostAddress,
		"--service-cluster-ip-range="+serviceSubnet, "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
		"--client-ca-file="+pki("ca.crt"), "--tls-cert-file="+pki("apiserver.crt"), "--tls-private-key-file="+pki("apiserver.key"),
		"--kubelet-client-certificate="+pki("apiserver-kubelet.crt"), "--kubelet-client-key="+pki("apiserver-kubelet.key"),
		"--kubelet-certificate-authority="+pki("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+pki("serviceaccount.pub"),
		"--service-account-signing-key-file="+pki("serviceaccount.key"),
		"--profiling=false",
	)
	if err != nil {
		return err
	}
	return p.serving(ctx, c.client, apiServer+"/readyz")
}

func (c *Cluster) startControllers(ctx context.Context) error {
	pki := c.pki.file
	common := []string{"--bind-address=127.0.0.1", "--leader-elect=false", "--profiling=false"}
	manager, err := c.run("bin", "kube-controller-manager", append(common,
		"--kubeconfig="+pki("controller-manager.conf"), "--use-service-account-credentials=true",
		"--service-account-private-key-file="+pki("serviceaccount.key"), "--root-ca-file="+pki("ca.crt"),
		"--cluster-cidr="+lab.PodSubnet, "--allocate-node-cidrs=false")...)
	if err != nil {
		return err
	}
	scheduler, err := c.run("bin", "kube-scheduler", append(common, "--kubeconfig="+pki("scheduler.conf"))...)
	if err != nil {
		return err
	}
	// Their serving certificates are made up at the start and tell nothing.
	client := c.insecureClient()
	if err := manager.serving(ctx, client, "https://127.0.0.1:10257/healthz"); err != nil {
		return err
	}
	return scheduler.serving(ctx, client, "https://127.0.0.1:10259/healthz")
}

// insecureClient takes any server certificate.
func (c *Cluster) insecureClient() *http.Client {
	t := c.client.Transport.(*http.Transport).Clone()
	t.TLSClientConfig.InsecureSkipVerify = true
	return &http.Client{Transport: t}
}
