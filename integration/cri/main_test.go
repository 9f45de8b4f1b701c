// SPDX-License-Identifier: Apache-2.0

package cri

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	internalapi "k8s.io/cri-api/pkg/apis"
	criclient "k8s.io/cri-client/pkg"

	"github.com/kata-v2/kata/integration/lab"
	"github.com/kata-v2/kata/integration/lab/leak"
)

// callTimeout bounds one call of the CRI.
const callTimeout = 40 * time.Second

// mode is one way in which pods are made.
type mode struct {
	name    string // of the subtests
	version string // of containerd
	handler string // runtime handler
}

// sandboxMode is what every test runs in. Those whose subject is not the same with
// a pause container, or on an old containerd, run in more; `make test-all` runs all in all.
var (
	sandboxMode = mode{"Sandbox", "2.4", lab.HandlerSandbox}
	pauseMode   = mode{"Pause", "2.4", lab.HandlerPause}
	oldMode     = mode{"Pause1.6", "1.6", lab.HandlerPause}

	allModes = []mode{
		sandboxMode, pauseMode,
		{"Sandbox2.2", "2.2", lab.HandlerSandbox}, {"Pause2.2", "2.2", lab.HandlerPause},
		{"Pause1.7", "1.7", lab.HandlerPause}, oldMode, // which have no Sandbox API for pods
	}
)

// allEnv makes each test run in allModes; `make test-all` sets it.
const allEnv = "KATA_TEST_ALL"

// node is a containerd with a client of its CRI.
type node struct {
	c       *lab.Containerd
	runtime internalapi.RuntimeService
}

// nodes are started on first use, one for each version, and stopped by TestMain.
var nodes = map[string]*node{}

// TestMain ends the nodes and looks for leftovers of the whole run.
func TestMain(m *testing.M) {
	os.Exit(leak.Main(m, "cri", func() (err error) {
		for _, n := range nodes {
			err = errors.Join(err, n.stop())
		}
		return err
	}))
}

// nodeOf returns the shared node of a version.
func nodeOf(t *testing.T, version string) *node {
	t.Helper()
	if n := nodes[version]; n != nil {
		return n
	}
	n, err := startNode(version)
	if err != nil {
		t.Fatal(err)
	}
	nodes[version] = n
	return n
}

func startNode(version string) (*node, error) {
	build := os.Getenv("KATA_BUILD")
	if build == "" {
		return nil, errors.New("KATA_BUILD is not set: it names the directory with bin/ and images/; run by make")
	}
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	c, err := lab.Start(ctx, lab.Options{
		Version: version, CRI: true, ShimDir: filepath.Join(build, "bin"), Networks: networks, Plugins: plugins,
		Kata: &lab.Kata{Images: filepath.Join(build, "images"), Set: map[string]string{
			"hypervisor.qemu.enable_annotations": `["default_vcpus", "internetworking_model", "rx_rate_limiter_max_rate", "tx_rate_limiter_max_rate"]`,
		}},
	})
	if err != nil {
		return nil, err
	}
	n := &node{c: c}
	if err := n.connect(ctx); err != nil {
		return nil, errors.Join(err, n.stop())
	}
	return n, nil
}

func (n *node) connect(ctx context.Context) (err error) {
	if err := n.c.ImportCRI(ctx); err != nil {
		return err
	}
	return n.dial(ctx)
}

// dial connects to the CRI.
func (n *node) dial(ctx context.Context) error {
	runtime, err := criclient.NewRemoteRuntimeServiceBuilder().
		WithEndpoint(n.c.Endpoint()).WithConnectionTimeout(callTimeout).WithTracerProvider(nil).Build(ctx)
	if err != nil {
		return err
	}
	n.runtime = runtime
	return nil
}

func (n *node) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	var err error
	if n.runtime != nil {
		err = n.runtime.Close(ctx)
	}
	return errors.Join(err, n.c.Stop(ctx))
}

// each runs a test in sandboxMode and in more.
func each(t *testing.T, test func(*box), more ...mode) {
	t.Helper()
	modes := append([]mode{sandboxMode}, more...)
	if os.Getenv(allEnv) != "" {
		modes = allModes
	}
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) { test(newBox(t, m)) })
	}
}
