// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/internal/directvolume"
	"github.com/kata-v2/kata/sandbox"
	"github.com/kata-v2/kata/sandbox/cgroup"
	"github.com/kata-v2/kata/sandbox/ledger"
)

// gcPercent trades a little CPU for a small heap: the daemon idles most of its life.
const gcPercent = 40

// shutdownTimeout bounds the end of the pod when nobody else does.
const shutdownTimeout = 10 * time.Second

// inherit takes over what start left in the daemon's descriptors.
func inherit() (l net.Listener, lock *os.File, d daemonParams, err error) {
	for _, fd := range []int{daemonListenFD, daemonLockFD, daemonParamsFD, daemonMountsFD} {
		syscall.CloseOnExec(fd) // the VMM must not hold the lock
	}
	pf := os.NewFile(daemonParamsFD, "params")
	defer pf.Close()
	data, err := io.ReadAll(io.NewSectionReader(pf, 0, maxStdin))
	if err == nil {
		err = json.Unmarshal(data, &d)
	}
	if err != nil {
		return nil, nil, d, fmt.Errorf("daemon parameters: %w", err)
	}
	lf := os.NewFile(daemonListenFD, "listener")
	defer lf.Close()
	if l, err = net.FileListener(lf); err != nil {
		return nil, nil, d, fmt.Errorf("daemon socket: %w", err)
	}
	return l, os.NewFile(daemonLockFD, "lock"), d, nil
}

// runDaemon is the pod's long-lived process.
func runDaemon(ctx context.Context) error {
	os.Unsetenv(envDaemon)
	debug.SetGCPercent(gcPercent)
	// Mounts of the host still arrive, ours do not go out, and all end with us.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("own mount namespace: %w", err)
	}
	l, lock, d, err := inherit()
	if err != nil {
		return err
	}
	log := newLogger(d)
	for _, n := range d.Notes {
		log.Warn(n)
	}
	led, err := ledger.Adopt(d.StateDir, d.Key, lock)
	if err != nil {
		log.Error("daemon", "error", err)
		return err
	}
	err = serve(ctx, d, l, led, log)
	if err != nil {
		log.Error("daemon", "error", err)
	}
	return errors.Join(err, led.Close())
}

// serve runs the services until the pod has ended.
func serve(ctx context.Context, d daemonParams, l net.Listener, led *ledger.Ledger, log *slog.Logger) error {
	cfg, _, err := config.Load(d.Config)
	if err != nil {
		return err
	}
	cgroups, err := cgroup.Detect()
	if err != nil {
		return err
	}
	pub := newPublisher(d.Namespace, d.TTRPCAddress, log)
	sb := sandbox.New(sandbox.Options{
		ID: d.Group, Key: d.Key, Config: cfg, Ledger: led, HostCPUs: runtime.NumCPU(), Cgroups: &cgroups, Log: log,
		HostMounts: os.NewFile(daemonMountsFD, "mounts"), DirectVolumes: directvolume.Root,
		Hypervisor: sandbox.NewQEMU(cfg, log), MakeTemplate: templateMaker(d),
		OOM: func(container string) {
			pub.publish(topicOOM, &events.TaskOOM{ContainerID: container})
		},
	})
	svc := newService(sb, pub, log)
	svc.stdio.namespace = d.Namespace
	svc.stdio.record = func(name string, pid int) (func(), error) { return recordChild(led, name, pid) }
	svc.oldStats = d.OldStats
	server, err := ttrpc.NewServer()
	if err != nil {
		return fmt.Errorf("ttrpc server: %w", err)
	}
	register(server, svc)
	registerVolumes(server, sb)
	registerPod(server, sb)
	registerCheckpoint(server, sb)
	registerSandbox(server, &sandboxService{
		svc: svc, sb: sb, log: log, load: d.Config, files: filepath.Join(led.Dir(), "etc"),
		hypervisor: func(c *config.Config) hypervisor.Hypervisor { return sandbox.NewQEMU(c, log) },
	})
	served := make(chan error, 1)
	conns := &trackingListener{Listener: l}
	go func() { served <- server.Serve(ctx, conns) }()

	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	select {
	case err = <-served:
	case s := <-signals:
		log.Info("ending on a signal", "signal", s.String())
	case <-svc.done:
	}
	sctx, cancel := context.WithTimeout(ctx, shutdownTimeout)
	defer cancel()
	err = errors.Join(err, sb.Stop(sctx), svc.close(sctx), pub.close(sctx))
	// containerd has read the last answer when it closes its connections. The
	// server's own Shutdown closes one that still owes an answer (ttrpc counts a
	// connection as idle until the first answer after a request).
	gctx, cancel2 := context.WithTimeout(ctx, time.Second)
	defer cancel2()
	conns.wait(gctx)
	server.Close() //nolint:errcheck // the process ends
	if errors.Is(err, ttrpc.ErrServerClosed) {
		return nil
	}
	return err
}

// recordChild writes a child into the ledger, which is asked to forget it once
// it is gone: until then it dies with this process, and delete makes sure of it.
func recordChild(led *ledger.Ledger, name string, pid int) (forget func(), err error) {
	e, err := ledger.Process(name, pid)
	if err != nil {
		return nil, err
	}
	token, err := led.Record(e)
	if err != nil {
		return nil, err
	}
	return func() { led.Forget(token) }, nil //nolint:errcheck // the pod's end names what is left
}
