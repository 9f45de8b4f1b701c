// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	criapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	criclient "k8s.io/cri-client/pkg"

	"github.com/kata-v2/kata/integration/lab"
)

// The rows of pods through the CRI.
const (
	podStart   = "pod-start"
	podCold    = podStart + "-cold" // booted
	podFurther = "pod-further"
	podExec    = "pod-exec"
	podDelete  = "pod-delete"
)

// podsRow begins the names of the rows of pods at one time.
const podsRow = podStart + "-"

func podsAtOnce(n int) string { return fmt.Sprintf("%s%d", podsRow, n) }
func bareAtOnce(n int) string { return fmt.Sprintf("%s-%d", BaseRow, n) }

// criConnection is the CRI of the bench's containerd, as the kubelet reaches it.
type criConnection struct{ criapi.RuntimeService }

func (e *Env) connectCRI(ctx context.Context) (*criConnection, error) {
	if err := e.c.ImportCRI(ctx); err != nil {
		return nil, err
	}
	s, err := criclient.NewRemoteRuntimeServiceBuilder().
		WithEndpoint(e.c.Endpoint()).WithConnectionTimeout(callTimeout).WithTracerProvider(nil).Build(ctx)
	if err != nil {
		return nil, fmt.Errorf("bench: CRI: %w", err)
	}
	return &criConnection{s}, nil
}

// handler is the CRI's name for a runtime: for Kata the one without a pause
// container where containerd has that.
func (e *Env) handler(runtime string) string {
	switch {
	case runtime == Runc:
		return lab.HandlerRunc
	case runtime != Kata:
		return peerHandler(runtime)
	case strings.HasPrefix(e.o.Version, "1."):
		return lab.HandlerPause
	}
	return lab.HandlerSandbox
}

// criPod is a pod of the bench.
type criPod struct {
	e      *Env
	id     string
	first  string // its first container
	config *runtimeapi.PodSandboxConfig
	serial int
}

// startPod runs a pod with one container: the way of the kubelet from
// RunPodSandbox to the answer of StartContainer.
func (e *Env) startPod(ctx context.Context, name, runtime string, args ...string) (*criPod, error) {
	return e.startPodWith(ctx, name, runtime, 0, args...)
}

// startPodWith is startPod with a memory limit of the container, and so of the pod; 0 is none.
func (e *Env) startPodWith(ctx context.Context, name, runtime string, memory int64, args ...string) (*criPod, error) {
	p := &criPod{e: e, config: &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Uid: name, Namespace: "bench"}, Hostname: name, LogDirectory: e.dir,
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			Resources: memoryLimit(memory),
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
			},
		},
	}}
	var err error
	if p.id, err = e.cri.RunPodSandbox(ctx, p.config, e.handler(runtime)); err != nil {
		return nil, fmt.Errorf("pod %s: %w", name, err)
	}
	if p.first, err = p.containerWith(ctx, &runtimeapi.ContainerConfig{Command: args}, memory); err != nil {
		return nil, errors.Join(fmt.Errorf("pod %s: %w", name, err), p.remove(context.WithoutCancel(ctx)))
	}
	return p, nil
}

// container adds a container and starts it.
func (p *criPod) container(ctx context.Context, args ...string) (string, error) {
	return p.containerWith(ctx, &runtimeapi.ContainerConfig{Command: args}, 0)
}

// containerWith adds a container with more of its configuration, and a memory limit unless that is 0.
func (p *criPod) containerWith(ctx context.Context, c *runtimeapi.ContainerConfig, memory int64) (string, error) {
	p.serial++
	name := fmt.Sprintf("c%d", p.serial)
	c.Metadata, c.Image = &runtimeapi.ContainerMetadata{Name: name}, &runtimeapi.ImageSpec{Image: lab.BusyboxImage}
	c.LogPath = p.config.Metadata.Name + "-" + name + ".log"
	c.Linux = &runtimeapi.LinuxContainerConfig{
		Resources: memoryLimit(memory),
		SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
		},
	}
	id, err := p.e.cri.CreateContainer(ctx, p.id, c, p.config)
	if err != nil {
		return "", err
	}
	return id, p.e.cri.StartContainer(ctx, id)
}

// memoryLimit is a limit in bytes, none for 0.
func memoryLimit(bytes int64) *runtimeapi.LinuxContainerResources {
	if bytes == 0 {
		return nil
	}
	return &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: bytes}
}

func (p *criPod) remove(ctx context.Context) error {
	return errors.Join(p.e.cri.StopPodSandbox(ctx, p.id), p.e.cri.RemovePodSandbox(ctx, p.id))
}

// pods measures one pod through the CRI, a clone: its start with a first container, a
// further container, an exec, an attach, its network, and its removal.
func (e *Env) pods(runtime string) Probe {
	row := func(name string, unit Unit) Row { return Row{name, runtime, unit} }
	rows := []Row{
		row(podStart, Milliseconds), row(podFurther, Milliseconds), row(podExec, Milliseconds), row(podDelete, Milliseconds), row(attachRow, Milliseconds),
		row(tcpRTT, Milliseconds), row(tcpIn, MegabytesPerSecond), row(tcpOut, MegabytesPerSecond),
	}
	return Probe{Rows: rows, Take: func(ctx context.Context, add Add) (err error) {
		c, err := e.clones(ctx)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, 2*callTimeout)
		defer cancel()
		timed := func(r Row, f func() error) error {
			began := time.Now()
			err := f()
			if err == nil {
				add(r, milliseconds(time.Since(began)))
			}
			return err
		}
		var p *criPod
		if err := timed(rows[0], func() (err error) { p, err = c.startPod(ctx, c.id(), runtime, "sh", "-c", netServers); return err }); err != nil {
			return err
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, p.remove(context.WithoutCancel(ctx)))
			}
		}()
		var second string
		if err := timed(rows[1], func() (err error) { second, err = p.container(ctx, "sleep", "100000"); return err }); err != nil {
			return err
		}
		if err := timed(rows[2], func() error { _, _, err := c.cri.ExecSync(ctx, second, []string{"true"}, callTimeout); return err }); err != nil {
			return err
		}
		took, err := p.attach(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", attachRow, err)
		}
		add(rows[4], milliseconds(took))
		if err := c.measureNetwork(ctx, p, runtime, add); err != nil {
			return err
		}
		return timed(rows[3], func() error { return p.remove(ctx) })
	}}
}

// podColdStart measures the start of a pod that boots, and removes it.
func (e *Env) podColdStart() Probe {
	row := Row{podCold, Kata, Milliseconds}
	return Probe{Rows: []Row{row}, Take: func(ctx context.Context, add Add) error {
		ctx, cancel := context.WithTimeout(ctx, 2*callTimeout)
		defer cancel()
		took, err := e.startCrowd(ctx, 1, Kata)
		if err == nil {
			add(row, milliseconds(took))
		}
		return err
	}}
}

// crowd measures how long n pods take that are started at one time, of every
// runtime, and how long n bare machines do.
func (e *Env) crowd(n int) Probe {
	bare := Row{bareAtOnce(n), Bare, Milliseconds}
	rows := []Row{}
	for _, r := range e.o.runtimes() {
		rows = append(rows, Row{podsAtOnce(n), r, Milliseconds})
	}
	rows = append(rows, bare)
	return Probe{Rows: rows, Take: func(ctx context.Context, add Add) error {
		c, err := e.clones(ctx)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, time.Duration(n)*callTimeout)
		defer cancel()
		began := time.Now()
		_, err = all(n, func(int) (bareTimes, error) { return bootBare(ctx, e.qemuPath, e.bareArgs, nil) })
		if err != nil {
			return err
		}
		add(bare, milliseconds(time.Since(began)))
		for _, row := range rows[:len(rows)-1] {
			took, err := c.startCrowd(ctx, n, row.Runtime)
			if err != nil {
				return fmt.Errorf("%s: %w", row.Runtime, err)
			}
			add(row, milliseconds(took))
		}
		return nil
	}}
}

// startCrowd is the time until the last of n pods has started.
func (e *Env) startCrowd(ctx context.Context, n int, runtime string) (time.Duration, error) {
	names := make([]string, n)
	for i := range names {
		names[i] = e.id()
	}
	began := time.Now()
	started, err := all(n, func(i int) (*criPod, error) { return e.startPod(ctx, names[i], runtime, "sleep", "100000") })
	took := time.Since(began)
	_, rerr := all(n, func(i int) (struct{}, error) {
		if started[i] == nil {
			return struct{}{}, nil
		}
		return struct{}{}, started[i].remove(context.WithoutCancel(ctx))
	})
	return took, errors.Join(err, rerr)
}

// all runs f n times at once and waits for all of them.
func all[T any](n int, f func(i int) (T, error)) ([]T, error) {
	out, errs := make([]T, n), make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { out[i], errs[i] = f(i) })
	}
	wg.Wait()
	return out, errors.Join(errs...)
}
