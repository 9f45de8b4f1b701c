// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"sync"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/vsock"
	"github.com/kata-v2/kata/internal/spawn"
	"github.com/kata-v2/kata/internal/tail"
)

// VM is one QEMU process.
type VM struct {
	log     *slog.Logger
	pid     int
	proc    *os.Process
	vsock   *vsockDevice
	qmp     *qmp
	console *tail.Buffer
	stderr  *tail.Buffer
	info    hypervisor.Info
	plugs   *plugs
	sizes   *sizes
	moves   migration
	saves   bool // see Save
	private bool // see PlugShare

	ready     chan struct{} // closed when the guest has dialled
	readyOnce sync.Once
	done      chan struct{} // closed when the process is gone and its readers have ended
	readers   sync.WaitGroup

	mu       sync.Mutex
	stopping bool   // guarded by mu; an end from now on is orderly
	orderly  bool   // guarded by mu; the end was, set before done is closed
	shutdown string // guarded by mu; reason of QEMU's SHUTDOWN event
	end      string // guarded by mu; how the process ended, set before done is closed
}

// run takes over a started process.
func (vm *VM) run(cmd *exec.Cmd, thread *spawn.Thread, console io.Closer) {
	vm.proc, vm.pid = cmd.Process, cmd.Process.Pid
	go func() {
		werr := cmd.Wait()
		// The sockets that QEMU held are closed, so the readers are at their end.
		vm.qmp.close()
		vm.readers.Wait()
		console.Close()
		thread.Close()
		vm.vsock.Close()
		vm.finish(werr)
	}()
}

// finish publishes why the process ended.
func (vm *VM) finish(werr error) {
	why := "exit status 0"
	if werr != nil {
		why = werr.Error()
	}
	vm.mu.Lock()
	if vm.shutdown != "" {
		why += " after " + vm.shutdown
	}
	vm.end = "QEMU ended: " + why
	vm.orderly = vm.stopping // a Stop that comes later does not change why it ended
	vm.mu.Unlock()
	close(vm.done)
}

// endErr is how the process ended, without what it said.
func (vm *VM) endErr() error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return errors.New(vm.end)
}

func (vm *VM) copyConsole(r io.Reader) {
	vm.readers.Add(1)
	go func() {
		defer vm.readers.Done()
		io.Copy(vm.console, r) //nolint:errcheck // ends with QEMU
	}()
}

// qmpEvent notes why QEMU is about to end (QEMU qapi/run-state.json, SHUTDOWN).
func (vm *VM) qmpEvent(e qmpEvent) {
	vm.sizes.event(e)
	switch e.Name {
	case "DEVICE_DELETED":
		vm.plugs.deleted(e.Data)
		return
	case "MIGRATION":
		vm.moves.event(e.Data)
		return
	case "SHUTDOWN":
	default:
		return
	}
	var d struct {
		Reason string `json:"reason"`
	}
	if json.Unmarshal(e.Data, &d) == nil {
		vm.mu.Lock()
		vm.shutdown = d.Reason
		vm.mu.Unlock()
	}
}

// acceptReady owns l; the device closes it when the machine ends.
func (vm *VM) acceptReady(l net.Listener) {
	defer l.Close()
	c, err := l.Accept()
	if err != nil {
		return
	}
	c.Close()
	vm.readyOnce.Do(func() { close(vm.ready) })
}

// awaitReady is acceptReady for a channel that tells by itself.
func (vm *VM) awaitReady(d *vsock.Serial) {
	select {
	case <-d.Ready():
		vm.readyOnce.Do(func() { close(vm.ready) })
	case <-d.Done():
	}
}

// WaitReady implements hypervisor.ReadyWaiter.
func (vm *VM) WaitReady(ctx context.Context) error {
	select {
	case <-vm.ready:
		return nil
	case <-vm.done:
		select {
		case <-vm.ready: // it had been, whatever came then
			return nil
		default:
			return vm.endErr()
		}
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Dial implements hypervisor.VM.
func (vm *VM) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	return vm.vsock.Dial(ctx, port)
}

// Listen implements hypervisor.VM.
func (vm *VM) Listen(port uint32) (net.Listener, error) { return vm.vsock.Listen(port) }

// Stop implements hypervisor.VM: QEMU is told to quit, which flushes its disks,
// and killed when ctx is done first, or is already.
func (vm *VM) Stop(ctx context.Context) error {
	vm.mu.Lock()
	vm.stopping = true
	vm.mu.Unlock()
	if ctx.Err() != nil {
		vm.kill()
		<-vm.done
		return nil
	}
	if err := vm.qmp.execute(ctx, "quit", nil, nil); err != nil && !errors.Is(err, errQMPClosed) {
		select {
		case <-vm.done:
		default:
			vm.log.Warn("QEMU does not quit, killing it", "error", err)
			vm.kill()
		}
	}
	select {
	case <-vm.done:
	case <-ctx.Done():
		vm.kill()
		<-vm.done
	}
	return nil
}

// kill is harmless once the process was waited for.
func (vm *VM) kill() {
	if err := vm.proc.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		vm.log.Warn("kill QEMU", "pid", vm.pid, "error", err)
	}
}

// Done implements hypervisor.VM.
func (vm *VM) Done() <-chan struct{} { return vm.done }

// Err implements hypervisor.VM.
func (vm *VM) Err() error {
	select {
	case <-vm.done:
	default:
		return nil
	}
	vm.mu.Lock()
	orderly, msg := vm.orderly, vm.end
	vm.mu.Unlock()
	if orderly {
		return nil
	}
	if s := vm.stderr.String(); s != "" {
		msg += "; stderr: " + s
	}
	if s := vm.console.String(); s != "" {
		msg += "; guest console: " + s
	}
	return errors.New(msg)
}

// Info implements hypervisor.VM.
func (vm *VM) Info() hypervisor.Info { return vm.info }

// String names the machine in messages.
func (vm *VM) String() string { return fmt.Sprintf("QEMU (pid %d)", vm.pid) }
