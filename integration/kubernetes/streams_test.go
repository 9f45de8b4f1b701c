// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

var streamsGroup = group{
	name: "kubectl", manifest: "pod.yaml", ready: []string{"pod/pod=Ready"},
	checks: []item{
		{"exec: both outputs and the exit code", execResult},
		{"exec: a megabyte through stdin", execInput},
		{"exec: a terminal", execTerminal},
		{"logs: tail, follow to the end", logs},
		{"port-forward: a server on any address, one on loopback", portForward},
	},
}

func execResult(k *check) {
	r := k.exec("pod/main", nil, "sh", "-c", "echo out; echo err >&2; exit 3")
	if r.Stdout != "out\n" || !strings.HasPrefix(r.Stderr, "err\n") || r.Code != 3 {
		k.Errorf("got %+v; want out, err, 3", r)
	}
}

func execInput(k *check) {
	cmd := k.c.KubectlCmd(k.ctx(callTime), "exec", "-i", "pod", "-c", "main", "--", "sh", "-c", "wc -c; echo done")
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = io.LimitReader(zeros{}, 1<<20), &out, &out
	k.ok(k.c.StartCmd(cmd))
	if err := cmd.Wait(); err != nil || out.String() != "1048576\ndone\n" {
		k.Errorf("%v, %q; want all bytes counted", err, out.String())
	}
}

// zeros reads as the letter z without end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'z'
	}
	return len(p), nil
}

func execTerminal(k *check) {
	master, slave := k.terminal(33, 101)
	cmd := k.c.KubectlCmd(k.ctx(callTime), "exec", "-it", "pod", "-c", "main", "--", "sh", "-c", "tty; read line; stty size; echo got $line")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	k.ok(k.c.StartCmd(cmd))
	slave.Close()
	_, err := master.WriteString("hello\n")
	k.ok(err)
	var out bytes.Buffer
	_, _ = io.Copy(&out, master) // ends with EIO when the last user of the other side is gone
	k.ok(cmd.Wait())
	for _, want := range []string{"/dev/", "got hello", "33 101"} {
		if !strings.Contains(out.String(), want) {
			k.Errorf("no %q in what the terminal shows: %q", want, out.String())
		}
	}
}

// terminal opens a pair of pseudo-terminal ends (pty(7)) of the given size.
func (k *check) terminal(rows, columns uint16) (master, slave *os.File) {
	k.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	k.ok(err)
	k.Cleanup(func() { master.Close() })
	fd := int(master.Fd())
	k.ok(unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	k.ok(err)
	k.ok(unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns}))
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	k.ok(err)
	return master, slave
}

func logs(k *check) {
	if got := k.kubectl("logs", "pod", "-c", "main"); got != "started\n" {
		k.Errorf("logs: %q", got)
	}
	// The log of the container that has ended, and what a tail of it is.
	k.kubectl("run", "lines", "--image=docker.io/library/busybox:latest", "--image-pull-policy=Never", "--restart=Never",
		`--overrides={"spec":{"runtimeClassName":"kata"}}`, "--", "sh", "-c", "for i in 1 2 3 4 5; do echo line $i; sleep 1; done")
	k.Cleanup(func() { k.kubectl("delete", "pod", "lines", "--now") })
	k.wait("pod/lines", "condition=Ready", readyTime)
	if got, want := k.kubectl("logs", "-f", "lines"), "line 1\nline 2\nline 3\nline 4\nline 5\n"; got != want {
		k.Errorf("logs -f: %q, want %q", got, want)
	}
	if got := k.kubectl("logs", "--tail=2", "lines"); got != "line 4\nline 5\n" {
		k.Errorf("logs --tail=2: %q", got)
	}
}

// forwarding is what port-forward prints for each port.
var forwarding = regexp.MustCompile(`Forwarding from 127\.0\.0\.1:(\d+) -> (\d+)`)

func portForward(k *check) {
	k.sh("pod/main", "echo from-loopback >/tmp/name; httpd -p 127.0.0.1:8081 -h /tmp")
	ctx := k.ctx(callTime)
	cmd := k.c.KubectlCmd(ctx, "port-forward", "--address=127.0.0.1", "pod/pod", ":8080", ":8081")
	var stderr bytes.Buffer
	out, err := cmd.StdoutPipe()
	k.ok(err)
	cmd.Stderr = &stderr
	k.ok(k.c.StartCmd(cmd))
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	ports := map[string]string{}
	for s := bufio.NewScanner(out); len(ports) < 2 && s.Scan(); {
		if m := forwarding.FindStringSubmatch(s.Text()); m != nil {
			ports[m[2]] = m[1]
		}
	}
	if len(ports) < 2 {
		k.Fatalf("port-forward ended early: %s", stderr.String())
	}
	if body := k.get("http://127.0.0.1:" + ports["8080"] + "/file"); body != "from-init" {
		k.Errorf("8080 says %q", body)
	}
	if body := k.get("http://127.0.0.1:" + ports["8081"] + "/name"); body != "from-loopback" {
		k.Errorf("8081 says %q", body)
	}
}

// get asks a server from the node and returns its answer, trimmed; an error is
// the check's, and the answer then.
func (k *check) get(url string) string {
	k.Helper()
	body, err := k.fetch(url)
	if err != nil {
		k.Errorf("from the node: %v", err)
		return err.Error()
	}
	return body
}

func (k *check) fetch(url string) (string, error) {
	ctx := k.ctx(10 * time.Second)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := k.c.HTTPClient().Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", url, resp.Status)
	}
	return strings.TrimSpace(string(data)), err
}

var attachGroup = group{
	name: "kubectl", manifest: "attach.yaml", ready: []string{"pod/attach=Ready"},
	checks: []item{{"attach: talks to the container, which then ends", func(k *check) {
		cmd := k.c.KubectlCmd(k.ctx(callTime), "attach", "-i", "attach")
		var out, stderr bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader("one\nend\n"), &out, &stderr
		k.ok(k.c.StartCmd(cmd))
		if err := cmd.Wait(); err != nil {
			k.Errorf("attach: %v: %s", err, stderr.String())
		}
		if out.String() != "heard one\nheard end\n" {
			k.Errorf("attach shows %q; %s", out.String(), stderr.String())
		}
		k.wait("pod/attach", "jsonpath={.status.phase}=Failed", callTime)
		k.want("pod/attach", "{.status.containerStatuses[0].state.terminated.exitCode}", "5")
	}}},
}
