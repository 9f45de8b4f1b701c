// SPDX-License-Identifier: Apache-2.0

package cri

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/kata-v2/kata/integration/lab/streaming"
)

// TestStreams: what goes through the CRI's streaming server, and logs. All parts share a pod.
func TestStreams(t *testing.T) {
	each(t, func(b *box) {
		p := b.run()
		for _, part := range []struct {
			name string
			test func(*pod)
		}{
			{"Exec", testStreamExec},
			{"Terminal", testStreamTerminal},
			{"Attach", testAttach},
			{"AttachTerminal", testAttachTerminal},
			{"ExecTimeout", testExecTimeout},
			{"LogRotation", testLogRotation},
			{"PortForward", testPortForward},
			{"Probes", testProbes},
		} {
			b.Run(part.name, func(t *testing.T) { part.test(p.in(t)) })
		}
	})
}

// execStream begins an exec.
func (c *container) execStream(tty, stdin bool, args ...string) *session {
	c.Helper()
	resp := must(c.runtime.Exec(c.ctx(), &runtimeapi.ExecRequest{
		ContainerId: c.id, Cmd: args, Tty: tty, Stdin: stdin, Stdout: true, Stderr: !tty,
	}))(c)
	return c.session(resp.Url, stdin, tty)
}

// attach begins an attach.
func (c *container) attach(tty, stdin bool) *session {
	c.Helper()
	resp := must(c.runtime.Attach(c.ctx(), &runtimeapi.AttachRequest{
		ContainerId: c.id, Tty: tty, Stdin: stdin, Stdout: true, Stderr: !tty,
	}))(c)
	return c.session(resp.Url, stdin, tty)
}

func testStreamExec(p *pod) {
	c := p.sleeper()
	s := c.execStream(false, true, "sh", "-c", "cat; echo err >&2; exit 7")
	want := make([]byte, 1<<20)
	rand.Read(want)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		if _, err := s.stdin.Write(want); err != nil {
			p.Error(err)
		}
		s.stdin.Close()
	})
	if got := s.stdout.all(); !bytes.Equal(got, want) {
		p.Errorf("%d bytes came back of %d", len(got), len(want))
	}
	if got := s.stderr.all(); string(got) != "err\n" {
		p.Errorf("stderr %q", got)
	}
	if code := s.end(); code != 7 {
		p.Errorf("exit code %d; want 7", code)
	}
	if code := c.execStream(false, false, "true").end(); code != 0 {
		p.Errorf("true: %d", code)
	}
}

func testStreamTerminal(p *pod) {
	c := p.sleeper()
	s := c.execStream(true, true, "sh", "-c", `trap 'stty size' WINCH; test -t 0 && test -t 1 && test -t 2 && echo a terminal; while :; do read -r l || continue; echo "<$l>"; [ "$l" = end ] && exit 5; done`)
	s.expect("a terminal\r\n")
	s.resize(101, 37)
	// The shell runs its trap when the read is over, which may end it early.
	s.write("one\n")
	s.expect("<one>\r\n")
	s.insist("more", "37 101\r\n")
	s.write("end\n")
	if code := s.end(); code != 5 {
		p.Errorf("exit code %d; want 5", code)
	}
	// Interrupt is a character.
	s = c.execStream(true, true, "sh", "-c", "echo up; sleep 3456; echo not here")
	s.expect("up\r\n")
	s.write("\x03")
	if code := s.end(); code != 130 {
		p.Errorf("exit code %d after an interrupt; want 130", code)
	}
}

// testAttach: to a container's stdio while it runs, twice over.
func testAttach(p *pod) {
	config := p.script("while read -r l; do echo \"<$l>\"; echo \"e $l\" >&2; done; echo over; exit 3")
	config.Stdin = true
	c := p.start(config)
	s := c.attach(false, true)
	s.write("one\n")
	s.expect("<one>\n")
	s.detach() // the container goes on
	again := c.attach(false, true)
	again.write("two\n")
	if got := again.expect("<two>\n"); strings.Contains(got, "one") {
		p.Errorf("the second attach shows what was before: %q", got)
	}
	second := c.attach(false, false) // beside it
	// It shows what is written once it is there, which nobody tells.
	for i := 0; !second.shows("<three "); i++ {
		again.write(fmt.Sprintf("three %d\n", i))
		again.expect(fmt.Sprintf("<three %d>\n", i))
	}
	if s := c.status(); s.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		p.Errorf("state %v", s.State)
	}
	c.stop(0)
	again.end()
	if got := c.log(); !strings.Contains(got, "<one>\n") || !strings.Contains(got, "<two>\n") || !strings.Contains(got, "e three 0\n") {
		p.Errorf("log %q", got)
	}

	// With StdinOnce the first attach's end is that of stdin.
	config = p.script("cat; echo over; exit 3")
	config.Stdin, config.StdinOnce = true, true
	c = p.start(config)
	s = c.attach(false, true)
	s.write("all\n")
	s.expect("all\n")
	s.ok(s.stdin.Close())
	s.expect("over\n")
	if st := c.wait(); st.ExitCode != 3 {
		p.Errorf("exit code %d; want 3", st.ExitCode)
	}
}

func testAttachTerminal(p *pod) {
	config := p.script(`while read -r l; do echo "<$l>"; stty size; [ "$l" = end ] && exit 4; done`)
	config.Stdin, config.Tty = true, true
	c := p.start(config)
	s := c.attach(true, true)
	s.resize(99, 33)
	s.insist("line", "33 99\r\n")
	s.detach()
	s = c.attach(true, true)
	s.write("end\n")
	s.expect("<end>\r\n")
	if st := c.wait(); st.ExitCode != 4 {
		p.Errorf("exit code %d; want 4", st.ExitCode)
	}
}

// testExecTimeout: an exec that is past its time is gone, and that it is deaf to
// TERM does not keep it. (Children of it that hold its output would, in containerd.)
func testExecTimeout(p *pod) {
	c := p.sleeper()
	began := time.Now()
	_, _, err := p.runtime.ExecSync(p.ctx(), c.id, []string{"sh", "-c", "trap '' TERM; while :; do :; done"}, time.Second)
	if err == nil || !strings.Contains(err.Error(), "timed out") {
		p.Errorf("got %v; want a timeout", err)
	}
	if took := time.Since(began); took < time.Second || took > 8*time.Second {
		p.Errorf("a timeout of 1 s took %v", took)
	}
	if ps := c.shell("ps -o args"); strings.Contains(ps, "trap") {
		p.Errorf("the exec still runs:\n%s", ps)
	}
}

// testLogRotation: the kubelet renames the log and has it opened again; no line is lost.
func testLogRotation(p *pod) {
	c := p.start(p.script("i=0; while [ $i -lt 40 ]; do echo line $i; i=$((i+1)); sleep 0.05; done"))
	c.awaitLog("line 3\n")
	path := filepath.Join(p.config.LogDirectory, c.name+".log")
	p.ok(os.Rename(path, path+".old"))
	p.ok(p.runtime.ReopenContainerLog(p.ctx(), c.id))
	c.wait()
	rest := c.log()
	p.ok(os.Rename(path, path+".new"))
	p.ok(os.Rename(path+".old", path))
	first := c.log()
	var want strings.Builder
	for i := range 40 {
		fmt.Fprintf(&want, "line %d\n", i)
	}
	if first+rest != want.String() {
		p.Errorf("the two logs are %q and %q", first, rest)
	}
	if first == "" || rest == "" {
		p.Errorf("logs of %d and %d bytes", len(first), len(rest))
	}
	if err := p.runtime.ReopenContainerLog(p.ctx(), c.id); err == nil {
		p.Error("the log of a container that has ended is opened again")
	}
}

// forward begins a port forward.
func (p *pod) forward() *spdy {
	p.Helper()
	resp := must(p.runtime.PortForward(p.ctx(), &runtimeapi.PortForwardRequest{PodSandboxId: p.id}))(p)
	return p.open(resp.Url, streaming.ForwardProtocol)
}

// testPortForward: to servers at the pod's loopback, through containerd, which
// connects there in the pod's namespace on the host.
func testPortForward(p *pod) {
	c := p.start(p.script("mkdir /www; echo hello >/www/index.html; httpd -p 127.0.0.1:8000 -h /www; httpd -p '[::1]:8006' -h /www; " +
		"nc -ll -p 8001 -e cat & until netstat -ltn | grep -q :8001; do sleep 0.1; done; echo up; exec sleep 1000"))
	c.awaitLog("up\n")
	s := p.forward()
	for id, port := range []int{8000, 8006, 8000} {
		f := s.connect(id, port)
		_, err := io.WriteString(f, "GET / HTTP/1.0\r\n\r\n")
		p.ok(err)
		if got := string(f.data.all()); !strings.HasPrefix(got, "HTTP/1.") || !strings.HasSuffix(got, "hello\n") {
			p.Errorf("port %d: %q", port, got)
		}
		p.ok(f.Close())
		if err := f.errors.all(); len(err) > 0 {
			p.Errorf("port %d: %s", port, err)
		}
	}
	testForwardBulk(p, s)
	f := s.connect(98, 7999) // nobody listens
	// containerd 1.7 resets the streams and says nothing.
	if err := f.errors.all(); !bytes.Contains(err, []byte("reset")) && p.mode.version != "1.7" {
		p.Errorf("a port without a server: %q; want a reset", err)
	}
	left := "for i in 1 2 3 4 5 6 7 8 9 10; do netstat -tn | grep ESTABLISHED >/tmp/left || break; sleep 0.3; done; cat /tmp/left"
	if got := c.shell(left); got != "" {
		p.Errorf("connections are left in the guest:\n%s", got)
	}
}

// testForwardBulk sends much both ways at the same time.
func testForwardBulk(p *pod, s *spdy) {
	f := s.connect(97, 8001)
	want := make([]byte, 2<<20)
	rand.Read(want)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		if _, err := f.Write(want); err != nil {
			p.Error(err)
		}
	})
	got, _ := f.data.until(func(b []byte) bool { return len(b) >= len(want) })
	if !bytes.Equal(got, want) {
		p.Errorf("%d bytes came back of %d", len(got), len(want))
	}
	p.ok(f.Close())
	if err := f.errors.all(); len(err) > 0 {
		p.Errorf("%s", err)
	}
}

// testProbes: what the kubelet asks of a container, before it is up, while it is,
// and when it is no more: a command in it, and HTTP and TCP to the pod's address.
func testProbes(p *pod) {
	c := p.start(p.script("until [ -e /go ]; do sleep 0.1; done; mkdir /www; echo fine >/www/index.html; httpd -f -p 8100 -h /www & " +
		"until netstat -ltn | grep -q :8100; do sleep 0.1; done; touch /ready; echo up; until [ -e /down ]; do sleep 0.1; done; kill $!; wait; rm /ready; echo down; exec sleep 1000"))
	address := net.JoinHostPort(p.ip(), "8100")
	check := func(when string, healthy bool) {
		p.Helper()
		if _, _, err := c.exec("test", "-e", "/ready"); (err == nil) != healthy {
			p.Errorf("%s: exec: %v", when, err)
		}
		if got, err := p.get(address); (err == nil && got == "fine") != healthy {
			p.Errorf("%s: http: %q, %v", when, got, err)
		}
		err := p.c.InHostNet(func() error {
			conn, err := net.DialTimeout("tcp", address, waitTime)
			if err == nil {
				conn.Close()
			}
			return err
		})
		if healthy && err != nil || !healthy && !errors.Is(err, syscall.ECONNREFUSED) {
			p.Errorf("%s: tcp: %v", when, err)
		}
	}
	check("starting", false)
	c.shell("touch /go")
	c.awaitLog("up\n")
	check("up", true)
	c.shell("touch /down")
	c.awaitLog("down\n")
	check("down", false)
}
