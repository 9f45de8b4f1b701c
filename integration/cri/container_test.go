// SPDX-License-Identifier: Apache-2.0

package cri

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestContainers: what one container of a pod is and does. All parts share a pod.
func TestContainers(t *testing.T) {
	each(t, func(b *box) {
		p := b.run()
		for _, part := range []struct {
			name string
			test func(*pod)
		}{
			{"Life", testContainerLife},
			{"ExitCodes", testExitCodes},
			{"Exec", testExec},
			{"ExecEnd", testExecEnd},
			{"Grace", testGrace},
			{"Command", testCommand},
			{"Users", testUsers},
			{"Init", testInitSequence},
			{"Many", testMany},
		} {
			b.Run(part.name, func(t *testing.T) { part.test(p.in(t)) })
		}
	})
}

// in is the pod in a part of the test: containers that the part leaves are an error.
func (p *pod) in(t *testing.T) *pod {
	q := &pod{box: &box{T: t, node: p.node, mode: p.mode}, id: p.id, config: p.config}
	t.Cleanup(func() {
		all := must(q.runtime.ListContainers(q.ctx(), &runtimeapi.ContainerFilter{PodSandboxId: q.id}))(t)
		for _, c := range all {
			if err := q.runtime.RemoveContainer(q.ctx(), c.Id); err != nil {
				t.Error(err)
			}
		}
	})
	return q
}

func testContainerLife(p *pod) {
	before := time.Now().UnixNano()
	c := p.create(p.script("echo out; echo err >&2; exec sleep 1000"))
	if s := c.status(); s.State != runtimeapi.ContainerState_CONTAINER_CREATED || s.CreatedAt < before {
		p.Errorf("created: %v", s)
	}
	p.ok(p.runtime.StartContainer(p.ctx(), c.id))
	if s := c.status(); s.State != runtimeapi.ContainerState_CONTAINER_RUNNING || s.StartedAt < s.CreatedAt {
		p.Errorf("started: %v", s)
	}
	if err := p.runtime.StartContainer(p.ctx(), c.id); err == nil {
		p.Error("a running container starts again")
	}
	c.shell("true")
	c.stop(0)
	s := c.status()
	if s.State != runtimeapi.ContainerState_CONTAINER_EXITED || s.ExitCode != 137 || s.FinishedAt < s.StartedAt {
		p.Errorf("stopped: %v", s)
	}
	if got := c.log(); got != "out\nerr\n" && got != "err\nout\n" {
		p.Errorf("log %q", got)
	}
	c.stop(0) // again: no error
	c.removeNow()
	c.removeNow()
	if _, err := p.runtime.ContainerStatus(p.ctx(), c.id, false); err == nil {
		p.Error("a removed container has a status")
	}
}

func testExitCodes(p *pod) {
	for script, want := range map[string]struct {
		code   int32
		reason string
	}{
		"exit 0": {0, "Completed"}, "exit 42": {42, "Error"}, "kill -9 $$": {137, "Error"}, "kill -TERM $$; sleep 1": {143, "Error"},
	} {
		c := p.start(p.script(script))
		if s := c.wait(); s.ExitCode != want.code || s.Reason != want.reason {
			// PID 1 of its namespace does not get signals that it has no handler for.
			if !(strings.HasPrefix(script, "kill") && s.ExitCode == 0) {
				p.Errorf("%s: %d %s; want %v", script, s.ExitCode, s.Reason, want)
			}
		}
		c.removeNow()
	}
	config := p.containerConfig("/no/such/program")
	c := p.create(config)
	if err := p.runtime.StartContainer(p.ctx(), c.id); err == nil {
		p.Error("a program that does not exist starts")
	}
	if s := c.status(); s.State != runtimeapi.ContainerState_CONTAINER_EXITED || s.ExitCode == 0 {
		p.Errorf("a program that does not exist: %v", s)
	}
}

func testExec(p *pod) {
	c := p.sleeper()
	stdout, stderr, err := c.exec("sh", "-c", "echo out; echo err >&2; pwd")
	if stdout != "out\n/\n" || stderr != "err\n" || err != nil {
		p.Errorf("got %q, %q, %v", stdout, stderr, err)
	}
	_, _, err = c.exec("sh", "-c", "exit 3")
	if code, ok := err.(interface{ ExitStatus() int }); !ok || code.ExitStatus() != 3 {
		p.Errorf("exit 3: %v", err)
	}
	if _, _, err := c.exec("/no/such/program"); err == nil {
		p.Error("a program that does not exist runs")
	}
	// A probe that takes too long is ended, not only given up.
	began := time.Now()
	if _, _, err := p.runtime.ExecSync(p.ctx(), c.id, []string{"sleep", "777"}, time.Second); err == nil {
		p.Error("an exec past its timeout succeeded")
	}
	if took := time.Since(began); took > 8*time.Second {
		p.Errorf("a timeout of 1 s took %v", took)
	}
	if ps := c.shell("ps -o args"); strings.Contains(ps, "sleep 777") {
		p.Errorf("the exec that timed out still runs:\n%s", ps)
	}
	// Twenty probes, one after the other, leave nothing.
	for range 20 {
		c.shell("true")
	}
	if n := c.shell("ps | wc -l"); n != "5" { // header, sleep, sh, ps, wc
		p.Errorf("%s lines of ps:\n%s", n, c.shell("ps"))
	}
}

// testExecEnd: execs that run when their container ends have status 137, as with runc.
func testExecEnd(p *pod) {
	c := p.start(p.script("until [ -e /over ]; do sleep 0.05; done"))
	var execs sync.WaitGroup
	for i := range 4 {
		execs.Go(func() {
			_, _, err := c.exec("sh", "-c", fmt.Sprintf("touch /up%d; exec sleep 100", i))
			if code, ok := err.(interface{ ExitStatus() int }); !ok || code.ExitStatus() != 128+9 {
				p.Errorf("an exec whose container ends: %v", err)
			}
		})
	}
	c.shell("until ls /up0 /up1 /up2 /up3 2>/dev/null; do sleep 0.05; done")
	_, _, _ = c.exec("touch", "/over") // may end with the container
	execs.Wait()
	c.wait()
}

// testGrace: TERM, then the grace period, then KILL.
func testGrace(p *pod) {
	polite := p.start(p.script("trap 'exit 0' TERM; echo up; while :; do sleep 0.1; done"))
	deaf := p.start(p.script("trap '' TERM; echo up; while :; do sleep 0.1; done"))
	for _, c := range []*container{polite, deaf} {
		c.awaitLog("up\n")
	}
	began := time.Now()
	polite.stop(20)
	if took, s := time.Since(began), polite.status(); s.ExitCode != 0 || took > 10*time.Second {
		p.Errorf("TERM handled: exit code %d after %v", s.ExitCode, took)
	}
	began = time.Now()
	deaf.stop(2)
	if took, s := time.Since(began), deaf.status(); s.ExitCode != 137 || took < 2*time.Second || took > 8*time.Second {
		p.Errorf("TERM ignored: exit code %d after %v; want 137 after 2 s", s.ExitCode, took)
	}
}

// awaitLog waits until the container has written text.
func (c *container) awaitLog(text string) {
	c.Helper()
	deadline := time.Now().Add(waitTime)
	for !strings.Contains(c.log(), text) {
		if time.Now().After(deadline) {
			c.Fatalf("%s does not write %q, only %q", c.name, text, c.log())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func testCommand(p *pod) {
	config := p.script("echo $A-$B; pwd; echo $0 $1")
	config.Args = []string{"zero", "one"}
	config.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte("a b")}, {Key: "B", Value: []byte("é")}}
	config.WorkingDir = "/tmp"
	if got := p.output(config); got != "a b-é\n/tmp\nzero one\n" {
		p.Errorf("got %q", got)
	}
	if got := p.output(p.script("echo $PATH; echo $HOSTNAME")); got != "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"+p.config.Hostname+"\n" {
		p.Errorf("environment of the image and the pod: %q", got)
	}
}

func testUsers(p *pod) {
	config := p.script("id; id -G")
	config.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: 1000}
	config.Linux.SecurityContext.RunAsGroup = &runtimeapi.Int64Value{Value: 3000}
	config.Linux.SecurityContext.SupplementalGroups = []int64{5000, 6000}
	if got := p.output(config); !strings.Contains(got, "uid=1000(user) gid=3000") || !strings.Contains(got, "5000 6000") {
		p.Errorf("got %q", got)
	}
	config = p.script("id -u; echo x >/home/user/x && ls -n /home/user/x")
	config.Linux.SecurityContext.RunAsUsername = "user"
	if got := p.output(config); !strings.HasPrefix(got, "1000\n") || !strings.Contains(got, "1000     1000") {
		p.Errorf("by name: %q", got)
	}
	// A user whom the image does not know, as some platforms give to every project.
	config = p.containerConfig("sleep", "1000")
	config.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: 4242}
	config.Envs = []*runtimeapi.KeyValue{{Key: "HOME"}}
	c := p.start(config)
	if got := c.shell("echo $HOME; tr '\\0' '\\n' </proc/1/environ | grep HOME"); got != "/\nHOME=/" {
		p.Errorf("home of an unknown user: %q", got)
	}
	// What the kernel makes of the memory that a machine begins with bounds no container.
	if got := c.shell("ulimit -u; cat /proc/sys/kernel/threads-max /proc/sys/fs/file-max /proc/sys/net/ipv4/tcp_max_tw_buckets"); got != "unlimited\n4194304\n9223372036854775807\n16384" {
		p.Errorf("limits of processes, threads, open files, closed connections: %q", got)
	}
}

// testInitSequence: containers that run one after the other, as a pod's init
// containers do, see each other's ends and not each other's files.
func testInitSequence(p *pod) {
	for _, name := range []string{"first", "second"} {
		if got := p.output(p.script("echo " + name + "; ls /made-by-* 2>/dev/null; touch /made-by-" + name)); got != name+"\n" {
			p.Errorf("%s: %q", name, got)
		}
	}
	c := p.sleeper()
	if got := c.shell("ls / | grep made || echo none"); got != "none" {
		p.Errorf("the container after them sees %s", got)
	}
}

// manyContainers is how many containers one pod must take at once.
const manyContainers = 20

func testMany(p *pod) {
	all := make([]*container, manyContainers)
	for i := range all {
		all[i] = p.sleeper()
	}
	boots := map[string]bool{}
	for _, c := range []*container{all[0], all[manyContainers/2], all[manyContainers-1]} {
		boots[c.shell("cat /proc/sys/kernel/random/boot_id")] = true
	}
	if len(boots) != 1 {
		p.Errorf("%d machines", len(boots))
	}
	for _, c := range all {
		c.stop(0)
		c.removeNow()
	}
}
