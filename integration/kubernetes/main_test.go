// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kata-v2/kata/integration/kubernetes/cluster"
	"github.com/kata-v2/kata/integration/lab"
)

// programsEnv names the directory that scripts/kubernetes.sh filled. Only
// `make test-k8s` sets it: the programs take a quarter of an hour to build.
const programsEnv = "KATA_KUBERNETES"

// startTime bounds the start of the cluster, stopTime its end.
const (
	startTime = 3 * time.Minute
	stopTime  = 2 * time.Minute
)

func TestMain(m *testing.M) {
	if os.Getenv(programsEnv) == "" {
		fmt.Println("kubernetes: needs the Kubernetes programs; make test-k8s builds them and runs this")
		os.Exit(0)
	}
	if err := cluster.Enter(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// groups are all checks in the order in which they run. Those of a group share
// the objects of one manifest; the last ones disturb the node.
var groups = []group{
	podGroup, streamsGroup, attachGroup, volumesGroup, emptyDirGroup, downwardGroup,
	probesGroup, readinessGroup, deploymentGroup, jobGroup, cronJobGroup, serviceGroup,
	policiesGroup, oomGroup, graceGroup, readOnlyGroup, hostUsersGroup, resizeGroup, tenGroup, restartGroup, drainGroup, deployGroup,
}

func TestKubernetes(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), startTime)
	defer cancel()
	c, err := cluster.Start(ctx, cluster.Options{
		Programs: os.Getenv(programsEnv), Build: os.Getenv("KATA_BUILD"), Log: os.Stdout,
	})
	if err != nil {
		t.Fatal(err)
	}
	n := &node{c: c, handler: lab.HandlerSandbox}
	if h := os.Getenv("HANDLER"); h != "" {
		n.handler = h
	}
	t.Cleanup(func() { n.finish(t) })
	if err := n.applyRuntimeClass(ctx, n.handler); err != nil {
		t.Fatal(err)
	}
	// What the installing DaemonSet would do; the RuntimeClass selects by it.
	if _, err := c.Must(ctx, "label", "node", cluster.NodeName, nodeLabel+"=true"); err != nil {
		t.Fatal(err)
	}
	for _, g := range groups {
		t.Run(g.name, func(t *testing.T) { n.run(t, g) })
	}
}

// node is the cluster under test and what was found.
type node struct {
	c       *cluster.Cluster
	handler string
	table   table
}

// applyRuntimeClass applies the RuntimeClass that is delivered, for a handler, in place
// of the one before: the field cannot be changed.
func (n *node) applyRuntimeClass(ctx context.Context, handler string) error {
	data, err := os.ReadFile(filepath.Join("..", "..", "deploy", "runtimeclass.yaml"))
	if err != nil {
		return err
	}
	text := strings.Replace(string(data), "\nhandler: kata\n", "\nhandler: "+handler+"\n", 1)
	path := filepath.Join(n.c.Dir, "runtimeclass.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		return err
	}
	_, err = n.c.Must(ctx, "replace", "--force", "-f", path)
	return err
}

// finish stops the cluster, which is the last check: nothing may be left.
func (n *node) finish(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), stopTime)
	defer cancel()
	if dir := os.Getenv("KATA_BUILD"); dir != "" && t.Failed() {
		if err := n.c.SaveLogs(filepath.Join(dir, "kubernetes-logs")); err != nil {
			t.Error(err)
		}
	}
	r := row{check: "node: nothing is left at the end"}
	if err := n.c.Stop(ctx); err != nil {
		t.Error(err)
		r.fail(err.Error())
	}
	n.table.add(r)
	text := n.table.markdown()
	fmt.Printf("\n%s\n", text)
	if dir := os.Getenv("KATA_BUILD"); dir != "" {
		if err := os.WriteFile(filepath.Join(dir, "kubernetes.md"), []byte(text), 0o644); err != nil {
			t.Error(err)
		}
	}
}
