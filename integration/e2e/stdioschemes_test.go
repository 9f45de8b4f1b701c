// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// scheme is one way to take a process's output.
type scheme struct {
	name string
	// open gives the addresses and what reads them once the process was deleted.
	open func(t *testing.T) (p pipes, opened func(), got func() (out, errs string))
	// where "out" and "err" end up, without a terminal and with one.
	out, errs string
	ttyOut    string
	// once leaves the scheme to an exec without a terminal.
	once bool
}

func nothing() {}

var schemes = []scheme{
	{"fifo", func(t *testing.T) (pipes, func(), func() (string, string)) {
		p := newPipes(t)
		out, errs := collect(t, p.stdout), collect(t, p.stderr)
		return pipes{stdout: p.stdout, stderr: "fifo://" + p.stderr}, func() { out.started(); errs.started() },
			func() (string, string) {
				return lines(receive(t, "stdout", out.data)), lines(receive(t, "stderr", errs.data))
			}
	}, "out\n", "err\n", "out\nerr\n", false},
	// ctr and nerdctl name the same address for both.
	{"file", func(t *testing.T) (pipes, func(), func() (string, string)) {
		path := filepath.Join(t.TempDir(), "new", "folder", "log")
		return pipes{stdout: "file://" + path, stderr: "file://" + path}, nothing,
			func() (string, string) { return text(path), "" }
	}, "out\nerr\n", "", "out\nerr\n", false},
	{"binary", func(t *testing.T) (pipes, func(), func() (string, string)) {
		uri, dir := logDriver(t)
		return pipes{stdout: uri, stderr: uri}, nothing, func() (string, string) { return text(dir, "out"), text(dir, "err") }
	}, "out\n", "err\n", "out\nerr\n", false},
	{"two drivers", func(t *testing.T) (pipes, func(), func() (string, string)) {
		one, dir1 := logDriver(t)
		two, dir2 := logDriver(t)
		return pipes{stdout: one, stderr: two}, nothing, func() (string, string) { return text(dir1, "out"), text(dir2, "err") }
	}, "out\n", "err\n", "", true},
	{"null", func(*testing.T) (pipes, func(), func() (string, string)) {
		return pipes{}, nothing, func() (string, string) { return "", "" }
	}, "", "", "", false},
	{"/dev/null and a file", func(t *testing.T) (pipes, func(), func() (string, string)) {
		path := filepath.Join(t.TempDir(), "log")
		return pipes{stdin: "/dev/null", stdout: "file:///dev/null", stderr: "file://" + path}, nothing,
			func() (string, string) { return "", text(path) }
	}, "", "err\n", "", true},
	{"a driver and a pipe", func(t *testing.T) (pipes, func(), func() (string, string)) {
		uri, dir := logDriver(t)
		p := newPipes(t)
		errs := collect(t, p.stderr)
		return pipes{stdout: uri, stderr: p.stderr}, errs.started, func() (string, string) {
			return text(dir, "out"), lines(receive(t, "stderr", errs.data))
		}
	}, "out\n", "err\n", "", true},
}

// testSchemes: every way to take output, for a first process and an exec, with
// and without a terminal. Everything is there when Delete has returned.
func testSchemes(b *box) {
	for _, sc := range schemes {
		for _, tty := range []bool{false, true} {
			for _, first := range []bool{false, true} {
				if sc.once && (tty || first) {
					continue
				}
				b.Run(fmt.Sprintf("%s/tty=%v/init=%v", sc.name, tty, first), func(t *testing.T) {
					ctx := calls(t)
					s := (&box{t, b.c}).dialShim(stdioPod)
					io, opened, got := sc.open(t)
					// Without a stream the descriptor is the guest's own /dev/null.
					check := "true"
					if io.stdout == "" && !tty {
						check = `[ "$(readlink /proc/$$/fd/1)" = /dev/null ] && [ "$(readlink /proc/$$/fd/0)" = /dev/null ]`
					}
					script := check + ` || exit 9; echo out; sleep 0.05; echo err >&2; exit 3`
					var x *proc
					if first {
						sp := newSpec(t, "sh", "-c", script).group(stdioPod)
						sp.Process.Terminal = tty
						x = s.addInit(ctx, sp, io)
					} else {
						x = s.addExec(ctx, stdioPod, shell(tty, script), io)
					}
					opened()
					x.end(3)
					out, errs := got()
					want, wantErrs := sc.out, sc.errs
					if tty {
						want, wantErrs = sc.ttyOut, ""
					}
					if out != want || errs != wantErrs {
						t.Errorf("stdout %q, stderr %q; want %q, %q", out, errs, want, wantErrs)
					}
				})
			}
		}
	}
}

// testLogURIs: what ctr makes of --log-uri and --null-io.
func testLogURIs(b *box) {
	path := filepath.Join(b.TempDir(), "log")
	run := func(id string, flags ...string) {
		b.Helper()
		args := append([]string{"run", "--rm", "--runtime", runtimeName, "--config", newSpec(b.T, "sh", "-c", "echo out; echo err >&2").group(stdioPod).file(b.T)}, flags...)
		b.want(b.ctr(append(args, id)...), 0, "")
	}
	run("log-file", "--log-uri", "file://"+path)
	if got := readFile(b.T, path); got != "out\nerr\n" && got != "err\nout\n" {
		b.Errorf("the log holds %q", got)
	}
	uri, dir := logDriver(b.T)
	run("log-binary", "--log-uri", uri)
	out, errs, who := readFile(b.T, filepath.Join(dir, "out")), readFile(b.T, filepath.Join(dir, "err")), readFile(b.T, filepath.Join(dir, "who"))
	if out != "out\n" || errs != "err\n" || who != "log-binary "+b.c.Namespace()+" dir "+dir+"\n" {
		b.Errorf("the driver got %q and %q as %q", out, errs, who)
	}
	run("no-io", "--null-io")
}

// testBadDrivers: a driver that cannot do its work keeps the process from
// running; the error names it, and nothing of either is left.
func testBadDrivers(b *box) {
	ctx, s := calls(b.T), b.dialShim(stdioPod)
	for _, c := range []struct{ uri, want string }{
		{"binary:///no/such/driver", "/no/such/driver"},
		{driverScript(b.T, "echo full disk >&2; exit 1"), "full disk"},
		{"tcp://somewhere", "tcp"},
	} {
		err := s.tryExec(ctx, stdioPod, process("true"), pipes{stdout: c.uri})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			b.Errorf("%s: %v; want %q", c.uri, err, c.want)
		}
	}
	if err := s.tryExec(ctx, stdioPod, process("true"), pipes{stdout: "/no/such/pipe"}); status.Code(err) != codes.InvalidArgument {
		b.Errorf("a pipe that is not there: %v", err)
	}
	r := b.ctr("run", "--rm", "--runtime", runtimeName, "--config", newSpec(b.T, "true").group(stdioPod).file(b.T), "--log-uri", driverScript(b.T, "echo no place >&2; exit 1"), "bad-driver")
	if r.Code == 0 || !strings.Contains(r.Stderr, "no place") {
		b.Errorf("ctr run: %+v; want the driver's words", r)
	}
	b.remove("bad-driver")
}

// TestDriverDiesWithShim: a killed shim leaves no driver, however deaf that is.
func TestDriverDiesWithShim(t *testing.T) {
	b := newBox(t)
	b.Cleanup(func() { b.remove("driven") })
	b.ok("run", "--detach", "--runtime", runtimeName, "--log-uri", driverScript(t, "exec 5>&-\nexec sleep 100000\n"),
		"--config", newSpec(t, "sleep", "100000").file(t), "driven")
	f := b.family("driven")
	driver := 0
	for pid, command := range children(t, f.shim) {
		if strings.HasPrefix(command, "sleep ") {
			driver = pid
		}
	}
	if driver == 0 {
		t.Fatalf("the shim's children are %v; want the driver", children(t, f.shim))
	}
	fd, err := unix.PidfdOpen(driver, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Kill(f.shim, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 5000); n != 1 {
		t.Errorf("the driver outlives its shim by 5 s: %v", err)
	}
}
