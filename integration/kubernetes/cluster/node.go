// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/integration/lab"
)

// kubeletConfig is KubeletConfiguration (kubelet.config.k8s.io/v1beta1). What
// differs from the defaults is due to the machine: it may have cgroup v1 and
// swap, its root may lack CAP_SYS_RESOURCE, its disk may be nearly full. Volumes
// are looked at every few seconds, so that a live update is seen soon.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 0.0.0.0
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: %[1]q}
authorization: {mode: Webhook}
tlsCertFile: %[2]q
tlsPrivateKeyFile: %[3]q
containerRuntimeEndpoint: %[4]q
cgroupDriver: cgroupfs
cgroupRoot: /%[5]s
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
makeIPTablesUtilChains: false
clusterDomain: cluster.local
resolvConf: %[6]q
podLogsDir: %[7]q
volumePluginDir: %[8]q
syncFrequency: 5s
nodeStatusUpdateFrequency: 2s
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {memory.available: 64Mi, nodefs.available: 0%%, nodefs.inodesFree: 0%%, imagefs.available: 0%%, imagefs.inodesFree: 0%%}
maxPods: 60
`

// proxyConfig is KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1). The
// connection tracking limits are the kernel's, not the network namespace's, and
// stay as they are. All pods hang on one bridge, so replies to pods pass the NAT
// only when the service's callers are hidden.
const proxyConfig = `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
hostnameOverride: node
clientConnection: {kubeconfig: %q}
clusterCIDR: %q
iptables: {masqueradeAll: true, syncPeriod: 5s, minSyncPeriod: 0s}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
`

func (c *Cluster) cgroup() string { return filepath.Base(c.Dir) }

// StartKubelet starts the kubelet and returns once it serves.
func (c *Cluster) StartKubelet(ctx context.Context) error {
	if err := c.makeCgroups(); err != nil {
		return err
	}
	resolv, config := c.path("resolv.conf"), c.path("kubelet.yaml")
	if err := os.WriteFile(resolv, []byte("nameserver 192.0.2.53\nsearch test.invalid\n"), 0o644); err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	text := fmt.Sprintf(kubeletConfig, c.pki.file("ca.crt"), c.pki.file("kubelet-server.crt"), c.pki.file("kubelet-server.key"),
		c.Containerd.Endpoint(), c.cgroup(), resolv, c.path("podlogs"), c.path("plugins"))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	cmd := exec.Command(filepath.Join(c.opts.Programs, "bin", "kubelet"), "--config="+config, "--kubeconfig="+c.pki.file("kubelet.conf"),
		"--root-dir="+c.path("kubelet"), "--cert-dir="+c.path("pki"), "--hostname-override="+NodeName, "--node-ip="+lab.HostAddress, "--v=3")
	cmd.Dir = c.Dir
	p, err := startProcess(c.Containerd.InHostNet, c.path("logs", "kubelet.log"), cmd, "kubelet")
	if err != nil {
		return err
	}
	c.kubelet = p
	return p.serving(ctx, c.client, "http://127.0.0.1:10248/healthz")
}

// StopKubelet ends the kubelet; pods live on.
func (c *Cluster) StopKubelet() error {
	p := c.kubelet
	if p == nil {
		return nil
	}
	c.kubelet = nil
	return p.stop()
}

func (c *Cluster) startProxy(context.Context) error {
	if err := c.Containerd.InHostNet(routeServices); err != nil {
		return fmt.Errorf("cluster: a route to services: %w", err)
	}
	config := c.path("proxy.yaml")
	if err := os.WriteFile(config, fmt.Appendf(nil, proxyConfig, c.pki.file("proxy.conf"), lab.PodSubnet), 0o600); err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	_, err := c.run("bin", "kube-proxy", "--config="+config)
	return err
}

// routeServices adds what a node's default route does: packets of the node itself
// to a service's address need a route to come as far as kube-proxy's rules.
func routeServices() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	_, services, err := net.ParseCIDR(serviceSubnet)
	if err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: services, Src: net.ParseIP(lab.HostAddress)})
}

// awaitNode returns once the node is Ready and pods can be created in the
// default namespace.
func (c *Cluster) awaitNode(ctx context.Context) error {
	for _, args := range [][]string{
		{"wait", "--for=create", "node/" + NodeName, "--timeout=60s"},
		{"wait", "--for=condition=Ready", "node/" + NodeName, "--timeout=60s"},
		{"wait", "--for=create", "serviceaccount/default", "--timeout=60s"},
	} {
		if _, err := c.Must(ctx, args...); err != nil {
			return fmt.Errorf("%w\n%s", err, c.Logs(10))
		}
	}
	return nil
}

// hierarchies are the mounted cgroup file systems: several with version 1, one with 2.
func hierarchies() ([]string, error) {
	const top = "/sys/fs/cgroup"
	if _, err := os.Stat(filepath.Join(top, "cgroup.controllers")); err == nil {
		return []string{top}, nil
	}
	entries, err := os.ReadDir(top)
	if err != nil {
		return nil, fmt.Errorf("cluster: cgroups: %w", err)
	}
	var dirs []string
	for _, e := range entries {
		if e.IsDir() {
			dirs = append(dirs, filepath.Join(top, e.Name()))
		}
	}
	return dirs, nil
}

// makeCgroups makes the cgroup that the kubelet takes for the root.
func (c *Cluster) makeCgroups() error {
	dirs, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range dirs {
		dir := filepath.Join(h, c.cgroup())
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("cluster: cgroup: %w", err)
		}
		// cgroups(7): a new cpuset of version 1 is empty and takes no process.
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			value, err := os.ReadFile(filepath.Join(h, f))
			if err != nil {
				continue // not this controller
			}
			if err := os.WriteFile(filepath.Join(dir, f), bytes.TrimSpace(value), 0o644); err != nil {
				return fmt.Errorf("cluster: cgroup: %w", err)
			}
		}
	}
	return nil
}

// removeCgroups removes the cluster's cgroups, lowest first. A process in one is
// an error of whoever left it.
func (c *Cluster) removeCgroups() error {
	dirs, err := hierarchies()
	if err != nil {
		return err
	}
	var errs []error
	for _, h := range dirs {
		var found []string
		_ = filepath.WalkDir(filepath.Join(h, c.cgroup()), func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				found = append(found, path)
			}
			return nil
		})
		for i := len(found) - 1; i >= 0; i-- {
			if err := unix.Rmdir(found[i]); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("cgroup %s: %w", found[i], err))
			}
		}
	}
	return errors.Join(errs...)
}

// unmountAll detaches the volumes that a kubelet which was ended has left mounted.
func (c *Cluster) unmountAll() error {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("cluster: mounts: %w", err)
	}
	lines := strings.Split(string(data), "\n")
	var errs []error
	for i := len(lines) - 1; i >= 0; i-- {
		// proc_pid_mountinfo(5): the fifth field is the mount point.
		if f := strings.Fields(lines[i]); len(f) > 4 && strings.HasPrefix(f[4], c.Dir+"/") {
			errs = append(errs, unix.Unmount(f[4], unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
		}
	}
	return errors.Join(errs...)
}
