// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-v2/kata/integration/lab"
)

// The rows of streams; the first two are compared with the last two.
const (
	stdioOut  = "stdio-out"
	stdioIn   = "stdio-in"
	vsockUp   = "vsock-up"
	vsockDown = "vsock-down"
)

// The rows of ends.
const (
	exitEvent = "exit-event"
	killExit  = "kill-exit"
)

// streams measures the stdio of programs in an idle container, and how soon
// their ends are known to a client of containerd.
//
// The pipes are this process's, as a client's would be, and the execs are added
// over the shim's socket, so that nothing but the shim is between both.
func (e *Env) streams(runtime string) Probe {
	row := func(name string, unit Unit) Row { return Row{name, runtime, unit} }
	rows := []Row{row(stdioOut, MegabytesPerSecond), row(stdioIn, MegabytesPerSecond), row(exitEvent, Milliseconds), row(killExit, Milliseconds)}
	take := []func(*execClient, context.Context) (float64, error){(*execClient).output, (*execClient).input, (*execClient).ownEnd, (*execClient).killed}
	return Probe{Rows: rows, Take: func(ctx context.Context, add Add) error {
		return e.withContainer(ctx, runtime, Row{}, func(Row, float64) {}, func(id string) (err error) {
			x, err := e.execClient(ctx, id)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, x.close()) }()
			for i, row := range rows {
				ctx, cancel := context.WithTimeout(ctx, streamTimeout)
				v, err := take[i](x, ctx)
				cancel()
				if err != nil {
					return fmt.Errorf("%s: %w", row.Name, err)
				}
				add(row, v)
			}
			return nil
		})
	}}
}

// execClient adds processes to one container.
type execClient struct {
	e      *Env
	id     string
	shim   *lab.Shim
	events *events
	execs  int
}

func (e *Env) execClient(ctx context.Context, id string) (*execClient, error) {
	shim, err := e.c.DialShim(id)
	if err != nil {
		return nil, err
	}
	ev, err := e.watchEvents(ctx)
	if err != nil {
		return nil, errors.Join(err, shim.Close())
	}
	return &execClient{e: e, id: id, shim: shim, events: ev}, nil
}

func (x *execClient) close() error { return errors.Join(x.shim.Close(), x.events.close()) }

// running is a started process with our ends of its pipes.
type running struct {
	x      *execClient
	id     string
	dir    string
	stdin  *os.File
	stdout *os.File
	stderr *os.File // nothing comes; runc's shim wants one
}

// start runs a shell script in the container. The pipes do not block who opens
// them: each of ours is opened both ways.
func (x *execClient) start(ctx context.Context, script string) (_ *running, err error) {
	x.execs++
	r := &running{x: x, id: "bench-x" + strconv.Itoa(x.execs)}
	if r.dir, err = os.MkdirTemp(x.e.dir, "pipes-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.closeFiles())
		}
	}()
	for name, f := range map[string]**os.File{"in": &r.stdin, "out": &r.stdout, "err": &r.stderr} {
		path := filepath.Join(r.dir, name)
		if err := unix.Mkfifo(path, 0o600); err != nil {
			return nil, err
		}
		if *f, err = os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0); err != nil {
			return nil, err
		}
	}
	spec, err := json.Marshal(specs.Process{Args: []string{"sh", "-c", script}, Cwd: "/", Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}})
	if err != nil {
		return nil, err
	}
	if _, err := x.shim.Exec(ctx, &task.ExecProcessRequest{
		ID: x.id, ExecID: r.id, Stdin: filepath.Join(r.dir, "in"), Stdout: filepath.Join(r.dir, "out"), Stderr: filepath.Join(r.dir, "err"),
		Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: spec},
	}); err != nil {
		return nil, err
	}
	if _, err := x.shim.Start(ctx, &task.StartRequest{ID: x.id, ExecID: r.id}); err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	return r, errors.Join(r.stdin.SetDeadline(deadline), r.stdout.SetDeadline(deadline))
}

func (r *running) closeFiles() error {
	for _, f := range []*os.File{r.stdin, r.stdout, r.stderr} {
		if f != nil {
			f.Close()
		}
	}
	return os.RemoveAll(r.dir)
}

// end waits for the process's end and removes it.
func (r *running) end(ctx context.Context) error {
	_, err := r.x.shim.Wait(ctx, &task.WaitRequest{ID: r.x.id, ExecID: r.id})
	if err == nil {
		_, err = r.x.shim.Delete(ctx, &task.DeleteRequest{ID: r.x.id, ExecID: r.id})
	}
	return errors.Join(err, r.closeFiles())
}

// ready reads the line by which a script says that it runs.
func (r *running) ready() error {
	_, err := io.ReadFull(r.stdout, make([]byte, 1))
	return err
}

// output is the rate from the first byte of a program's output to the last, so
// that its start does not count.
func (x *execClient) output(ctx context.Context) (float64, error) {
	r, err := x.start(ctx, fmt.Sprintf("exec dd if=/dev/zero bs=%d count=%d 2>/dev/null", streamWrite, streamBytes/streamWrite))
	if err != nil {
		return 0, err
	}
	buf := make([]byte, 256<<10)
	first, err := r.stdout.Read(buf)
	began := time.Now()
	for n := first; err == nil && n < streamBytes; {
		var k int
		k, err = r.stdout.Read(buf)
		n += k
	}
	took := time.Since(began)
	if err != nil {
		return 0, errors.Join(err, r.closeFiles())
	}
	return float64(streamBytes-first) / 1e6 / took.Seconds(), r.end(ctx)
}

// input is the rate from our first write until the program says that it has read
// everything to the end of file.
func (x *execClient) input(ctx context.Context) (float64, error) {
	r, err := x.start(ctx, fmt.Sprintf("echo; dd of=/dev/null bs=%d 2>/dev/null; echo", streamWrite))
	if err != nil {
		return 0, err
	}
	if err := r.ready(); err != nil {
		return 0, errors.Join(err, r.closeFiles())
	}
	buf := make([]byte, streamWrite)
	began := time.Now()
	for range streamBytes / streamWrite {
		if _, err := r.stdin.Write(buf); err != nil {
			return 0, errors.Join(err, r.closeFiles())
		}
	}
	r.stdin.Close()
	if _, err = x.shim.CloseIO(ctx, &task.CloseIORequest{ID: x.id, ExecID: r.id, Stdin: true}); err == nil {
		err = r.ready()
	}
	took := time.Since(began)
	if err != nil {
		return 0, errors.Join(err, r.closeFiles())
	}
	return streamBytes / 1e6 / took.Seconds(), r.end(ctx)
}

// ownEnd is the time from the byte that makes a process end, when it is written
// to its stdin here, to its exit event here. So it contains the byte's way to the
// process and what that does before it ends.
func (x *execClient) ownEnd(ctx context.Context) (float64, error) {
	return x.untilEvent(ctx, "echo; read a; exit 0", func(r *running) error {
		_, err := r.stdin.WriteString("\n")
		return err
	})
}

// killed is the time from the call of Kill to the exit event.
func (x *execClient) killed(ctx context.Context) (float64, error) {
	return x.untilEvent(ctx, "echo; exec sleep 1000000", func(r *running) error {
		_, err := x.shim.Kill(ctx, &task.KillRequest{ID: x.id, ExecID: r.id, Signal: uint32(syscall.SIGKILL)})
		return err
	})
}

func (x *execClient) untilEvent(ctx context.Context, script string, cause func(*running) error) (float64, error) {
	r, err := x.start(ctx, script)
	if err != nil {
		return 0, err
	}
	if err := r.ready(); err != nil {
		return 0, errors.Join(err, r.closeFiles())
	}
	// The script's next command is under way now, not the echo.
	if err := pause(ctx, 100*time.Millisecond); err != nil {
		return 0, errors.Join(err, r.closeFiles())
	}
	began := time.Now()
	if err := cause(r); err != nil {
		return 0, errors.Join(err, r.closeFiles())
	}
	at, err := x.events.exit(ctx, r.id)
	if err != nil {
		return 0, errors.Join(err, r.closeFiles())
	}
	return milliseconds(at.Sub(began)), r.end(ctx)
}

// events are containerd's as `ctr events` prints them.
type events struct {
	cancel context.CancelFunc
	lines  chan eventLine
	end    func() error
}

type eventLine struct {
	text string
	at   time.Time
}

// watchEvents subscribes. An event that is published right away shows that the
// subscription stands.
func (e *Env) watchEvents(ctx context.Context) (*events, error) {
	ectx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	cmd := e.c.CtrCmd(ectx, "events")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("ctr events: %w", err)
	}
	ev := &events{cancel: cancel, lines: make(chan eventLine, 1024)}
	read := make(chan struct{})
	go func() {
		defer close(read)
		defer close(ev.lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			ev.lines <- eventLine{s.Text(), time.Now()}
		}
	}()
	ev.end = func() error {
		<-read
		_ = cmd.Wait() // it was killed
		return nil
	}
	probe := "bench-events-" + strconv.Itoa(e.serial)
	for {
		// ctr does not say when it is subscribed: repeat until it shows.
		_, lerr := e.ctr(ctx, "namespaces", "label", e.c.Namespace(), "probe="+probe)
		if lerr != nil {
			return nil, errors.Join(lerr, ev.close())
		}
		select {
		case <-ev.lines:
			return ev, nil
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), ev.close())
		}
	}
}

// exit waits for the exit event of an exec and tells when it came.
func (ev *events) exit(ctx context.Context, exec string) (time.Time, error) {
	for {
		select {
		case l, ok := <-ev.lines:
			if !ok {
				return time.Time{}, errors.New("ctr events ended")
			}
			if strings.Contains(l.text, "/tasks/exit ") && strings.Contains(l.text, `"`+exec+`"`) {
				return l.at, nil
			}
		case <-ctx.Done():
			return time.Time{}, fmt.Errorf("no exit event of %s: %w", exec, ctx.Err())
		}
	}
}

func (ev *events) close() error {
	ev.cancel()
	return ev.end()
}
