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
)

// readyTime bounds the wait for something that starts pods; callTime any other
// call. Without KVM a pod's machine takes seconds of a core.
const (
	readyTime  = 150 * time.Second
	callTime   = 60 * time.Second
	deleteTime = 60 * time.Second
)

// group is a set of checks on the objects of one manifest.
type group struct {
	name string
	// manifest is a file of manifests/, applied before the checks and deleted
	// after them; empty when the checks do that.
	manifest string
	// ready are objects whose condition, as in "pod/a=Ready", is waited for.
	ready  []string
	checks []item
}

// item is one check: a line of the table.
type item struct {
	name string
	do   func(*check)
}

// run runs a group. When its objects do not come up, each of its checks fails
// with that reason.
func (n *node) run(t *testing.T, g group) {
	setUp := row{check: g.name}
	began := time.Now()
	up := t.Run("up", func(t *testing.T) {
		k := &check{T: t, node: n, row: &setUp}
		defer k.explain()
		if g.manifest == "" {
			return
		}
		k.kubectl("apply", "-f", manifest(g.manifest))
		for _, r := range g.ready {
			object, condition, _ := strings.Cut(r, "=")
			k.wait(object, "condition="+condition, readyTime)
		}
		setUp.note = fmt.Sprintf("up after %.1f s", time.Since(began).Seconds())
	})
	for i, it := range g.checks {
		r := row{check: g.name + ": " + it.name}
		if !up {
			r.fail(setUp.note)
			n.table.add(r)
			continue
		}
		t.Run(it.name, func(t *testing.T) {
			k := &check{T: t, node: n, row: &r}
			defer k.explain() // before any clean-up takes the objects away
			it.do(k)
		})
		if i == 0 && r.note == "" {
			r.note = setUp.note
		}
		n.table.add(r)
	}
	n.tearDown(t, g)
}

// tearDown deletes a group's objects; only a failure is a line of the table.
func (n *node) tearDown(t *testing.T, g group) {
	r := row{check: g.name + ": is gone when deleted"}
	t.Run("down", func(t *testing.T) {
		k := &check{T: t, node: n, row: &r}
		if g.manifest != "" {
			k.remove(manifest(g.manifest))
		}
		if left := k.kubectl("get", "pods", "-o", "name"); strings.TrimSpace(left) != "" {
			k.kubectl("delete", "pods", "--all", "--force", "--grace-period=0", "--timeout=60s")
			k.Errorf("pods are left: %s", strings.Fields(left))
		}
	})
	if r.failed {
		n.table.add(r)
	}
}

func manifest(name string) string { return filepath.Join("manifests", name) }

// check is one check's view of the cluster. What it reports as an error is the
// note of its row.
type check struct {
	*testing.T
	*node
	row *row
}

func (k *check) Errorf(format string, args ...any) {
	k.Helper()
	k.row.fail(fmt.Sprintf(format, args...))
	k.T.Errorf(format, args...)
}

func (k *check) Fatalf(format string, args ...any) {
	k.Helper()
	k.row.fail(fmt.Sprintf(format, args...))
	k.T.Fatalf(format, args...)
}

// ok ends the check on an error.
func (k *check) ok(err error) {
	k.Helper()
	if err != nil {
		k.Fatalf("%v", err)
	}
}

// note says what was seen, in the row of a check that passes.
func (k *check) note(format string, args ...any) {
	if !k.row.failed {
		k.row.note = fmt.Sprintf(format, args...)
	}
}

// ctx bounds a call.
func (k *check) ctx(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	k.Cleanup(cancel)
	return ctx
}

// kubectl must succeed; it returns standard output.
func (k *check) kubectl(args ...string) string {
	k.Helper()
	out, err := k.c.Must(k.ctx(readyTime+callTime), args...)
	k.ok(err)
	return out
}

// wait waits for what `kubectl wait --for` can: condition=Ready, jsonpath=…, delete.
func (k *check) wait(object, what string, d time.Duration) {
	k.Helper()
	r, err := k.c.Kubectl(k.ctx(d+callTime), "wait", "--for="+what, object, "--timeout="+d.String())
	k.ok(err)
	if r.Code != 0 {
		k.Fatalf("%s: no %s within %v: %s", object, what, d, strings.TrimSpace(r.Stderr+k.warnings()))
	}
}

// field is a jsonpath of an object.
func (k *check) field(object, jsonpath string) string {
	k.Helper()
	return k.kubectl("get", object, "-o", "jsonpath="+jsonpath)
}

// want compares a jsonpath of an object.
func (k *check) want(object, jsonpath, want string) {
	k.Helper()
	if got := k.field(object, jsonpath); got != want {
		k.Errorf("%s %s = %q, want %q", object, jsonpath, got, want)
	}
}

// sh runs a script in a container and returns its output, trimmed. The pod may
// be "pod/container".
func (k *check) sh(pod, script string) string {
	k.Helper()
	r := k.exec(pod, nil, "sh", "-c", script)
	if r.Code != 0 {
		k.Fatalf("in %s: %s: exit status %d: %s", pod, script, r.Code, strings.TrimSpace(r.Stderr))
	}
	return strings.TrimSpace(r.Stdout)
}

// exec runs a command in a container by kubectl.
func (k *check) exec(pod string, flags []string, command ...string) cluster.Result {
	k.Helper()
	pod, container, _ := strings.Cut(pod, "/")
	args := append([]string{"exec", pod}, flags...)
	if container != "" {
		args = append(args, "-c", container)
	}
	r, err := k.c.Kubectl(k.ctx(callTime), append(append(args, "--"), command...)...)
	k.ok(err)
	return r
}

// pods are the names of the pods with a label that are not being deleted.
func (k *check) pods(label string) []string {
	k.Helper()
	const names = `{{range .items}}{{if not .metadata.deletionTimestamp}}{{.metadata.name}} {{end}}{{end}}`
	return strings.Fields(k.kubectl("get", "pods", "-l", label, "-o", "go-template="+names))
}

// remove deletes what a manifest describes and waits until it is gone, its pods included.
func (k *check) remove(path string) {
	k.Helper()
	r, err := k.c.Kubectl(k.ctx(deleteTime+callTime), "delete", "-f", path, "--ignore-not-found", "--cascade=foreground", "--timeout="+deleteTime.String())
	if err != nil || r.Code != 0 {
		k.Errorf("delete %s: %v %s %s", path, err, strings.TrimSpace(r.Stderr), k.warnings())
		_, err := k.c.Kubectl(k.ctx(callTime), "delete", "pods", "--all", "--force", "--grace-period=0", "--timeout=30s")
		k.ok(err)
	}
}

// warnings are the newest events that say what went wrong with pods.
func (k *check) warnings() string {
	r, err := k.c.Kubectl(k.ctx(callTime), "get", "events", "--field-selector=type=Warning", "--sort-by=.lastTimestamp",
		"-o", `jsonpath={range .items[*]}{.involvedObject.name}: {.message}{"\n"}{end}`)
	if err != nil || r.Stdout == "" {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(r.Stdout), "\n")
	return "; newest warning: " + lines[len(lines)-1]
}

// explain logs, after a failure, what the cluster knows.
func (k *check) explain() {
	if !k.Failed() {
		return
	}
	for _, args := range [][]string{{"get", "pods", "-o", "wide"}, {"describe", "pods"}} {
		r, err := k.c.Kubectl(k.ctx(callTime), args...)
		k.Logf("kubectl %s: %v\n%s%s", strings.Join(args, " "), err, r.Stdout, r.Stderr)
	}
	var lines []string
	for _, l := range k.c.Containerd.Log() {
		if strings.Contains(l, "level=error") || strings.Contains(l, "level=warning") || strings.Contains(l, "sandbox=") {
			lines = append(lines, l)
		}
	}
	k.Logf("the cluster's programs:\n%s", k.c.Logs(40))
	k.Logf("containerd and its shims:\n%s", strings.Join(lines[max(0, len(lines)-40):], "\n"))
}

// hostFile reads a file of this machine, for comparison.
func (k *check) hostFile(path string) string {
	k.Helper()
	data, err := os.ReadFile(path)
	k.ok(err)
	return strings.TrimSpace(string(data))
}
