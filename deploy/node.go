// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Bounds of what others do for us: containerd reads all its state when it starts.
const (
	restartTimeout  = 2 * time.Minute
	callTimeout     = 30 * time.Second
	templateTimeout = 10 * time.Minute // two machines boot, without KVM on a busy node
)

// NodeLabel marks a node on which the runtime is installed, as kata-deploy does.
const NodeLabel = "katacontainers.io/kata-runtime"

// RestartContainerd restarts the host's containerd through its systemd, from a
// container that has the host's root at root and its process namespace.
func RestartContainerd(ctx context.Context, root string) error {
	ctx, cancel := context.WithTimeout(ctx, restartTimeout)
	defer cancel()
	if err := onHost(ctx, root, "systemctl", "restart", "containerd"); err != nil {
		return fmt.Errorf("restart containerd: %w", err)
	}
	return nil
}

// MakeTemplates has the installed kata-ctl make what pods are cloned from, with the
// host's configuration, from a container as RestartContainerd's.
func MakeTemplates(ctx context.Context, root string) error {
	ctx, cancel := context.WithTimeout(ctx, templateTimeout)
	defer cancel()
	if err := onHost(ctx, root, "/"+filepath.Join(binDir, "kata-ctl"), "template", "init"); err != nil {
		return fmt.Errorf("make templates: %w", err)
	}
	return nil
}

// onHost runs a program of the host where the host's first process sees it.
func onHost(ctx context.Context, root string, command ...string) error {
	cmd := exec.CommandContext(ctx, "/usr/bin/nsenter", append([]string{"--target", "1", "--mount", "--"}, command...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	if root != "/" {
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
		cmd.Dir = "/"
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// Cluster is the API server of the pod that this process is in.
type Cluster struct {
	url    string
	token  string
	client *http.Client
}

// InCluster finds it by what Kubernetes gives every container: two variables,
// and a token and a certificate in secrets, a directory
// ("/var/run/secrets/kubernetes.io/serviceaccount").
func InCluster(secrets string) (*Cluster, error) {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: this is no pod")
	}
	token, err := os.ReadFile(filepath.Join(secrets, "token"))
	if err != nil {
		return nil, fmt.Errorf("service account: %w", err)
	}
	ca, err := os.ReadFile(filepath.Join(secrets, "ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("service account: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("service account: %s holds no certificate", filepath.Join(secrets, "ca.crt"))
	}
	return &Cluster{
		url: "https://" + net.JoinHostPort(host, port), token: strings.TrimSpace(string(token)),
		client: &http.Client{Timeout: callTimeout, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}},
	}, nil
}

// Label sets NodeLabel on a node, or removes it.
func (c *Cluster) Label(ctx context.Context, node string, set bool) error {
	var value any // null removes it (RFC 7386)
	if set {
		value = "true"
	}
	body, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": map[string]any{NodeLabel: value}}})
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPatch, c.url+"/api/v1/nodes/"+url.PathEscape(node), bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/merge-patch+json")
	req.Header.Set("Authorization", "Bearer "+c.token)
	resp, err := c.client.Do(req)
	if err != nil {
		return fmt.Errorf("label node %s: %w", node, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return fmt.Errorf("label node %s: %s: %s", node, resp.Status, bytes.TrimSpace(text))
	}
	return nil
}
