// SPDX-License-Identifier: Apache-2.0

package guestagent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/agentlog"
	"github.com/kata-v2/kata/guest-agent/boot"
	"github.com/kata-v2/kata/guest-agent/cgroups"
	"github.com/kata-v2/kata/guest-agent/devices"
	"github.com/kata-v2/kata/guest-agent/engine"
	"github.com/kata-v2/kata/guest-agent/forward"
	"github.com/kata-v2/kata/guest-agent/identity"
	"github.com/kata-v2/kata/guest-agent/network"
	"github.com/kata-v2/kata/guest-agent/pod"
	"github.com/kata-v2/kata/guest-agent/podinit"
	"github.com/kata-v2/kata/guest-agent/reaper"
	"github.com/kata-v2/kata/guest-agent/rpc"
	"github.com/kata-v2/kata/guest-agent/serialport"
	"github.com/kata-v2/kata/guest-agent/storage"
	"github.com/kata-v2/kata/guest-agent/streams"
	"github.com/kata-v2/kata/guest-agent/vsocket"
	"github.com/kata-v2/kata/internal/guestsched"
	"github.com/kata-v2/kata/protocols"
)

// readyTimeout bounds the ready dial: a host that does not take it dials us instead.
const readyTimeout = 5 * time.Second

// agent is what Run puts together.
type agent struct {
	version string
	params  boot.Params
	sink    *agentlog.Sink
	log     *slog.Logger
	modules *boot.Modules
	reaper  *reaper.Reaper
	hub     *streams.Hub
	listen  func(port uint32) (net.Listener, error)
	serial  *serialport.Port // in place of vsock; nil with vsock
	finder  *devices.Finder
	groups  func() (*cgroups.Manager, error) // made once, by whoever is first
	engine  *engine.Crun
	wg      sync.WaitGroup // every goroutine of the agent
	times   []any          // phases, for one log line
	last    time.Time
}

// Run is PID 1: it boots user space and serves until ctx is done. An error means
// that the guest is of no use; the caller ends it.
func Run(ctx context.Context, version string) error {
	a := &agent{version: version, reaper: reaper.New(), hub: streams.NewHub(), last: time.Now()}
	a.mark("t_kernel", sinceBoot())
	if err := a.boot(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer a.wg.Wait()
	defer cancel()
	return a.serve(ctx)
}

// sinceBoot is how long the kernel has been running.
func sinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// mark notes how long a phase took, in milliseconds.
func (a *agent) mark(name string, d time.Duration) {
	a.times = append(a.times, name, float64(d.Microseconds())/1000)
	a.last = time.Now()
}

func (a *agent) phase(name string) { a.mark(name, time.Since(a.last)) }

// boot does what has to be there before the first connection, and nothing else.
func (a *agent) boot() error {
	if err := boot.Mount(); err != nil {
		return err
	}
	a.phase("t_mount")
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	var bad []string
	a.params, bad = boot.ParseCmdline(string(cmdline))
	var out *os.File
	if a.params.LogPort == 0 {
		out = os.Stdout
		a.sink = agentlog.NewSink(out)
	} else {
		a.sink = agentlog.NewSink(nil)
	}
	a.log = agentlog.New(a.sink, a.params.LogLevel)
	for _, b := range bad {
		a.log.Warn(b)
	}
	if a.modules, err = boot.OpenModules(boot.ModuleDir); err != nil {
		return err
	}
	groups := []string{boot.GroupBoot}
	if a.params.Channel != "" {
		groups = append(groups, boot.GroupSerial)
	}
	for _, g := range groups {
		if err := a.modules.Ensure(g); err != nil {
			return err
		}
	}
	a.phase("t_modules")
	if err := boot.RaiseLimits(); err != nil {
		a.log.Warn("limits", agentlog.KeyError, err.Error())
	}
	return nil
}

// goRun starts a goroutine that Run waits for.
func (a *agent) goRun(f func()) {
	a.wg.Add(1)
	go func() { defer a.wg.Done(); f() }()
}

func (a *agent) serve(ctx context.Context) error {
	a.goRun(func() { a.reaper.Run(ctx) })
	svc, err := a.service(ctx)
	if err != nil {
		return err
	}
	srv, err := rpc.NewServer(svc)
	if err != nil {
		return err
	}
	a.listen = func(port uint32) (net.Listener, error) { return vsocket.Listen(vsocket.AnyCID, port) }
	listenServer := func() (net.Listener, error) { return vsocket.Listen(a.params.ServerCID, a.params.ServerPort) }
	if a.params.Channel != "" {
		a.serial = serialport.New()
		defer a.serial.Close()
		a.listen = a.serial.Listen
		listenServer = func() (net.Listener, error) { return a.serial.Listen(a.params.ServerPort) }
	}
	l, err := listenServer()
	if err != nil {
		return err
	}
	if svc.Streams {
		stdio, err := a.listen(a.params.StdioPort)
		if err != nil {
			return errors.Join(err, l.Close())
		}
		a.goRun(func() { a.hub.Serve(ctx, stdio, streams.ByPeerPort) })
	}
	failed := make(chan error, 2)
	a.goRun(func() { failed <- srv.Serve(ctx, l) })
	a.phase("t_listen")
	// Both ports accept by now: connections queue in the kernel.
	a.goRun(func() { a.ready(ctx, failed) })
	defer srv.Close()
	select {
	case err := <-failed:
		return fmt.Errorf("serve %v: %w", l.Addr(), err)
	case <-ctx.Done():
		return nil
	}
}

// service puts the parts behind the RPCs together. Nothing here touches the
// kernel: what an RPC needs is made when the first one needs it.
func (a *agent) service(ctx context.Context) (*rpc.Service, error) {
	a.finder = &devices.Finder{Sys: "/sys", Dev: "/dev", Timeout: a.params.HotplugTimeout}
	store := storage.NewManager(a.modules, a.finder, protocols.GuestRunDir)
	a.groups = sync.OnceValues(func() (*cgroups.Manager, error) { return a.makeGroups(ctx) })
	a.engine = engine.NewCrun(engine.CrunPath, "/run/crun", a.reaper)
	p := pod.New(pod.Config{
		Engine: a.engine,
		Group: func(id string) (pod.Group, error) {
			m, err := a.groups()
			if err != nil {
				return nil, err
			}
			return m.Create(id)
		},
		PIDHolder: func(ctx context.Context) (int, <-chan reaper.Status, error) { return podinit.Start(ctx, a.reaper) },
		Storage:   store, Finder: a.finder, Hub: a.hub, Modules: a.modules, Params: a.params, Log: a.log,
		RunDir: protocols.GuestRunDir, NSDir: "/var/run/sandbox-ns", SysctlDir: "/proc/sys",
	})
	return &rpc.Service{
		AgentVersion: a.version, Pod: p, Storage: store, Modules: a.modules, Finder: a.finder,
		Network: network.Config{HotplugTimeout: a.params.HotplugTimeout, ByPCI: a.finder.NetByPCI},
		Reaper:  a.reaper, Sink: a.sink, Log: a.log,
		SharedDir: protocols.GuestSharedDir, SyncedDir: protocols.GuestSyncedDir, Streams: a.params.StdioPort != 0,
		Started: func() { a.goRun(a.giveBack) }, OneCPU: a.switchOn,
	}, nil
}

// makeGroups makes the cgroup manager.
func (a *agent) makeGroups(ctx context.Context) (*cgroups.Manager, error) {
	w, err := cgroups.NewWatcher()
	if err != nil {
		return nil, err
	}
	a.goRun(func() { w.Run(ctx) })
	return cgroups.New(boot.CgroupRoot, w)
}

// ready tells the host, then does what can wait until after that. A guest that
// may be saved does it before: its copies need not.
func (a *agent) ready(ctx context.Context, failed chan<- error) {
	if a.serial != nil {
		a.settle(ctx)
		if err := clearFree(); err != nil { // only larger without
			a.log.Error("clear free memory", agentlog.KeyError, err.Error())
		}
		a.openChannel(ctx, failed)
		return
	}
	if a.params.ReadyPort != 0 {
		c, err := vsocket.Dial(vsocket.HostCID, a.params.ReadyPort, readyTimeout)
		if err != nil {
			a.log.Warn("ready dial", agentlog.KeyPort, a.params.ReadyPort, agentlog.KeyError, err.Error())
		} else {
			c.Close()
		}
	}
	a.phase("t_ready")
	a.settle(ctx)
}

// openChannel serves hosts, in the machine that is saved and in each that
// is restored from it.
func (a *agent) openChannel(ctx context.Context, failed chan<- error) {
	err := a.serial.Serve(ctx, a.finder, a.params.Channel, identity.Assume)
	if err != nil {
		failed <- err
	}
}

// settle does what the first container will most likely need.
func (a *agent) settle(ctx context.Context) {
	if err := boot.LoopbackUp(); err != nil {
		a.log.Error("loopback", agentlog.KeyError, err.Error())
	}
	if err := boot.RaiseMachineLimits("/proc/sys"); err != nil {
		a.log.Warn("limits", agentlog.KeyError, err.Error())
	}
	// Not needed before: nothing in the guest serves anything yet.
	a.serveOn(protocols.ForwardPort, func(l net.Listener) { forward.Serve(ctx, l, a.log) })
	a.prepare()
	a.log.Info("agent ready", append([]any{"version", a.version}, a.times...)...)
	if a.params.LogPort != 0 {
		a.serveOn(a.params.LogPort, func(l net.Listener) { a.sink.Serve(ctx, l) })
	}
	if a.params.DebugConsole {
		a.debugConsole(ctx)
	}
	if err := guestsched.Tune(); err != nil { // only slower without
		a.log.Warn("scheduler", agentlog.KeyError, err.Error())
	}
}

// prepare does, while the host is still busy, what the first container will
// most likely need. An error is not lost: the first use meets it again.
func (a *agent) prepare() {
	if a.serial != nil { // whatever devices its copies get
		for _, g := range []string{boot.GroupNet, boot.GroupBlock} {
			if err := a.modules.Ensure(g); err != nil {
				a.log.Error("modules", agentlog.KeyError, err.Error())
			}
		}
		if err := warm(); err != nil { // only slower without
			a.log.Error("warm", agentlog.KeyError, err.Error())
		}
		a.phase("t_warm")
	}
	if !a.modules.None() && (a.serial != nil || boot.HasShare("/sys")) {
		if err := a.modules.EnsureFS("virtiofs"); err != nil {
			a.log.Error("file system modules", agentlog.KeyError, err.Error())
		}
	}
	a.phase("t_fs")
	groups, err := a.groups()
	if err == nil && a.serial != nil {
		err = errors.Join(groups.PrepareDevices(), groups.HoldSwitches())
	}
	if err != nil {
		a.log.Error("cgroups", agentlog.KeyError, err.Error())
	}
	a.phase("t_cgroups")
	if err := a.engine.Prepare(); err != nil {
		a.log.Error("OCI engine", agentlog.KeyError, err.Error())
	}
	a.phase("t_engine")
}

// switchOn has the kernel make the changes of its own code now that a pod's life
// would bring later.
func (a *agent) switchOn() error {
	groups, err := a.groups()
	if err == nil {
		err = groups.HoldSwitches()
	}
	a.giveBack()
	return err
}

// giveBack makes the kernel give memory that it does not use back to the host. It
// comes after the first container's start, which is not to wait for it.
func (a *agent) giveBack() {
	if err := a.modules.EnsureVirtio("/sys", boot.VirtioBalloon, "virtio_balloon"); err != nil {
		a.log.Error("free memory does not go back to the host", agentlog.KeyError, err.Error())
	}
}

func (a *agent) serveOn(port uint32, f func(net.Listener)) {
	l, err := a.listen(port)
	if err != nil {
		a.log.Error("listen", agentlog.KeyPort, port, agentlog.KeyError, err.Error())
		return
	}
	a.goRun(func() { f(l) })
}

// Fatal says on the console why the guest ends.
func Fatal(err error) {
	msg := strings.ReplaceAll(err.Error(), "\n", "; ")
	fmt.Fprintf(os.Stderr, "%s: fatal: %s\n", filepath.Base(os.Args[0]), msg)
}
