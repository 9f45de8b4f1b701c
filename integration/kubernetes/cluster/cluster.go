// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	criclient "k8s.io/cri-client/pkg"

	"github.com/kata-v2/kata/integration/lab"
)

// NodeName is the name of the only node.
const NodeName = "node"

// The addresses of the cluster, all within the lab's network.
const (
	serviceSubnet = "10.96.0.0/16"
	serviceIP     = "10.96.0.1" // of the service "kubernetes"
	apiServer     = "https://127.0.0.1:6443"
	etcdURL       = "http://127.0.0.1:2379"
)

// Options choose a cluster.
type Options struct {
	// Programs is what scripts/kubernetes.sh made: bin/ and etcd/.
	Programs string
	// Build is what `make image` made: bin/ and images/.
	Build string
	// Log gets a line for each step of the start, when set.
	Log io.Writer
}

// Cluster is a running Kubernetes.
type Cluster struct {
	// Containerd is the node's container runtime.
	Containerd *lab.Containerd
	// Dir holds all files of the cluster; logs/ has one file a program.
	Dir string

	opts    Options
	pki     *authority
	client  *http.Client // trusts the cluster's authority, dials in the node's network
	running []*process   // in the order of their start; the kubelet is apart
	kubelet *process     // nil while stopped
	started time.Time
}

// Start starts containerd, the control plane and the node, and returns once the
// node is Ready and pods can be created. On error nothing is left running. ctx
// bounds the start only.
func Start(ctx context.Context, o Options) (*Cluster, error) {
	dir, err := os.MkdirTemp("", "kata-k8s-")
	if err != nil {
		return nil, fmt.Errorf("cluster: %w", err)
	}
	c := &Cluster{Dir: dir, opts: o, started: time.Now()}
	if err := c.start(ctx); err != nil {
		return nil, errors.Join(err, c.Stop(context.WithoutCancel(ctx)))
	}
	return c, nil
}

func (c *Cluster) start(ctx context.Context) error {
	for _, p := range []string{"pki", "logs", "etcd", "home", "kubelet", "podlogs", "plugins"} {
		if err := os.Mkdir(c.path(p), 0o700); err != nil {
			return fmt.Errorf("cluster: %w", err)
		}
	}
	steps := []struct {
		name string
		do   func(context.Context) error
	}{
		{"containerd", c.startContainerd},
		{"certificates", c.writeCertificates},
		{"etcd", c.startEtcd},
		{"API server", c.startAPIServer},
		{"controllers", c.startControllers},
		{"kubelet", c.StartKubelet},
		{"kube-proxy", c.startProxy},
		{"node ready", c.awaitNode},
	}
	for _, s := range steps {
		if err := s.do(ctx); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		if c.opts.Log != nil {
			fmt.Fprintf(c.opts.Log, "%6.1f s: %s\n", time.Since(c.started).Seconds(), s.name)
		}
	}
	return nil
}

func (c *Cluster) path(elem ...string) string {
	return filepath.Join(append([]string{c.Dir}, elem...)...)
}

// patience is the shim's configuration: without KVM, ten machines that start at
// once on two cores need longer than the defaults for a single step.
var patience = map[string]string{"agent.kata.launch_process_timeout": "120", "runtime.create_container_timeout": "150"}

func (c *Cluster) startContainerd(ctx context.Context) (err error) {
	c.Containerd, err = lab.Start(ctx, lab.Options{
		Version: "2.4", CRI: true, ShimDir: filepath.Join(c.opts.Build, "bin"),
		Kata: &lab.Kata{Images: filepath.Join(c.opts.Build, "images"), Set: patience},
	})
	if err != nil {
		return err
	}
	return c.Containerd.ImportCRI(ctx)
}

// run starts a program of the cluster that stays.
func (c *Cluster) run(dir, name string, args ...string) (*process, error) {
	cmd := exec.Command(filepath.Join(c.opts.Programs, dir, name), args...)
	cmd.Dir = c.Dir
	p, err := startProcess(c.Containerd.InHostNet, c.path("logs", name+".log"), cmd, name)
	if err == nil {
		c.running = append(c.running, p)
	}
	return p, err
}

// writeCertificates makes the cluster's authority and one identity a program.
func (c *Cluster) writeCertificates(context.Context) error {
	a, err := newAuthority(c.path("pki"))
	if err != nil {
		return err
	}
	c.pki = a
	_, err = a.keyPair("serviceaccount")
	errs := []error{
		err,
		a.server("apiserver", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost", "127.0.0.1", lab.HostAddress, serviceIP),
		a.server("kubelet-server", NodeName, lab.HostAddress, "127.0.0.1"),
		a.client("apiserver-kubelet", "kube-apiserver", "system:masters"),
	}
	// The names and groups for which Kubernetes has roles.
	for _, id := range [][]string{
		{"admin", "admin", "system:masters"}, {"kubelet", "system:node:" + NodeName, "system:nodes"},
		{"controller-manager", "system:kube-controller-manager"}, {"scheduler", "system:kube-scheduler"}, {"proxy", "system:kube-proxy"},
	} {
		errs = append(errs, a.client(id[0], id[1], id[2:]...), a.kubeconfig(id[0], apiServer))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	c.client, err = c.newClient()
	return err
}

// newClient is an HTTP client inside the cluster, with the administrator's identity.
func (c *Cluster) newClient() (*http.Client, error) {
	pair, err := tls.LoadX509KeyPair(c.pki.file("admin.crt"), c.pki.file("admin.key"))
	if err != nil {
		return nil, fmt.Errorf("cluster: administrator: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(c.pki.cert)
	return &http.Client{Transport: &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}},
		DialContext:       c.Dial,
		DisableKeepAlives: true,
	}}, nil
}

// Dial connects from the node's network.
func (c *Cluster) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = c.Containerd.InHostNet(func() (err error) {
		// One address, dialled by the calling thread: a name would be resolved by others.
		conn, err = (&net.Dialer{FallbackDelay: -1}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// HTTPClient makes requests from the node's network, with no kept connections.
func (c *Cluster) HTTPClient() *http.Client { return c.client }

// Stop ends the cluster and removes its files. Pods that still run are ended and
// named in the error by the lab, as leftovers; it may be called on a half started
// cluster. ctx bounds the orderly part.
func (c *Cluster) Stop(ctx context.Context) error {
	errs := []error{c.StopKubelet()}
	for i := len(c.running) - 1; i >= 0; i-- {
		errs = append(errs, c.running[i].stop())
	}
	if c.Containerd != nil {
		errs = append(errs, c.removeSandboxes(ctx), c.Containerd.Stop(ctx))
	}
	errs = append(errs, c.unmountAll(), c.removeCgroups())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("cluster: stop: %w", err)
	}
	return os.RemoveAll(c.Dir)
}

// removeSandboxes removes what the kubelet has not: it keeps the sandbox of a
// pod that is gone for up to a minute. One whose pod is not gone is an error.
func (c *Cluster) removeSandboxes(ctx context.Context) error {
	if c.Containerd.PID() == 0 {
		return nil
	}
	runtime, err := criclient.NewRemoteRuntimeServiceBuilder().
		WithEndpoint(c.Containerd.Endpoint()).WithConnectionTimeout(kubectlTime).WithTracerProvider(nil).Build(ctx)
	if err != nil {
		return fmt.Errorf("sandboxes: %w", err)
	}
	list, err := runtime.ListPodSandbox(ctx, nil)
	errs := []error{err}
	for _, s := range list {
		if s.State == runtimeapi.PodSandboxState_SANDBOX_READY {
			errs = append(errs, fmt.Errorf("pod %s still runs", s.Metadata.GetName()), runtime.StopPodSandbox(ctx, s.Id))
		}
		errs = append(errs, runtime.RemovePodSandbox(ctx, s.Id))
	}
	return errors.Join(errs...)
}

// SaveLogs copies the log of each program, and that of containerd with its shims,
// to a directory, which it empties first.
func (c *Cluster) SaveLogs(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("cluster: logs: %w", err)
	}
	if err := os.CopyFS(dir, os.DirFS(c.path("logs"))); err != nil {
		return fmt.Errorf("cluster: logs: %w", err)
	}
	text := strings.Join(c.Containerd.Log(), "\n")
	if err := os.WriteFile(filepath.Join(dir, "containerd.log"), []byte(text), 0o600); err != nil {
		return fmt.Errorf("cluster: logs: %w", err)
	}
	return nil
}

// Logs are the last n lines of each program's log.
func (c *Cluster) Logs(n int) string {
	var b strings.Builder
	all := c.running
	if c.kubelet != nil {
		all = append(all[:len(all):len(all)], c.kubelet)
	}
	for _, p := range all {
		fmt.Fprintf(&b, "== %s\n%s\n", p.name, p.tail(n))
	}
	return b.String()
}
