// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/hypervisor"
)

// restoreTimeout bounds how long a restored guest may take until it answers: it
// has nothing to do but to take on its new identity, but 64 may do so at one time on two cores.
const restoreTimeout = 60 * time.Second

// migration is the state of a save or a restore, as QEMU's MIGRATION events
// tell it (qapi/migration.json).
type migration struct {
	once sync.Once
	end  chan string // holds the final status
}

// ended yields "completed", "failed" or "cancelled".
func (m *migration) ended() chan string {
	m.once.Do(func() { m.end = make(chan string, 1) })
	return m.end
}

func (m *migration) event(data json.RawMessage) {
	var d struct {
		Status string `json:"status"`
	}
	if json.Unmarshal(data, &d) != nil {
		return
	}
	switch d.Status {
	case "completed", "failed", "cancelled":
		select {
		case m.ended() <- d.Status:
		default:
		}
	}
}

// memory checks and passes on the files of a machine that is saved or restored.
func (s *start) memory() error {
	c := &s.c
	switch {
	case c.Memory == nil && (c.MemoryPrivate || c.Restore != nil):
		return errors.New("no Config.Memory: a private or restored machine needs its file")
	case c.Restore != nil && c.Vsock != hypervisor.VsockSerial:
		return fmt.Errorf("vsock backend is %q: a machine is restored with %q only", c.Vsock, hypervisor.VsockSerial)
	case c.MemoryPrivate && (len(c.Shares) > 0 || c.ShareLater):
		return errors.New("private memory (Config.MemoryPrivate) with shares: their daemons would not see the guest's memory")
	case c.Restore != nil && len(c.Shares) > maxPluggedShares:
		return fmt.Errorf("%d Shares: a restored machine has place for %d", len(c.Shares), maxPluggedShares)
	case c.Memory == nil:
		return nil
	}
	st, err := c.Memory.Stat()
	if err != nil {
		return fmt.Errorf("guest memory (Config.Memory): %w", err)
	}
	if st.Size() != int64(c.MemoryBytes) {
		return fmt.Errorf("guest memory (Config.Memory) has %d bytes, not MemoryBytes = %d", st.Size(), c.MemoryBytes)
	}
	if c.MemoryPrivate && c.ReclaimFreed {
		if seals, err := unix.FcntlInt(c.Memory.Fd(), unix.F_GET_SEALS, 0); err != nil || seals&unix.F_SEAL_WRITE == 0 {
			return errors.New("guest memory (Config.Memory) that is private and not sealed, with ReclaimFreed: what the guest frees would be cut out of the file")
		}
	}
	f, err := dup(c.Memory)
	if err != nil {
		return fmt.Errorf("guest memory (Config.Memory): %w", err)
	}
	s.l.MemoryFD = s.inherit.add(f)
	s.vm.saves = !c.MemoryPrivate
	return nil
}

func dup(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// capabilities of every save and restore: shared memory stays where it is, and
// events tell the end.
func (vm *VM) prepareMove(ctx context.Context) error {
	type capability struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	return vm.qmp.execute(ctx, "migrate-set-capabilities", map[string]any{
		"capabilities": []capability{{"x-ignore-shared", true}, {"events", true}},
	}, nil)
}

const stateName = "state" // of the file in QEMU

// move runs a migration command over a file to its end.
func (vm *VM) move(ctx context.Context, command string, state *os.File) error {
	if err := vm.prepareMove(ctx); err != nil {
		return err
	}
	if err := vm.qmp.executeWith(ctx, "getfd", map[string]any{"fdname": stateName}, nil, state); err != nil {
		return err
	}
	select {
	case <-vm.moves.ended(): // of one that was given up
	default:
	}
	if err := vm.qmp.execute(ctx, command, map[string]any{"uri": "fd:" + stateName}, nil); err != nil {
		return err
	}
	select {
	case end := <-vm.moves.ended():
		if end == "completed" {
			return nil
		}
		return fmt.Errorf("QMP %s: %s", command, end)
	case <-vm.done:
		return vm.endErr()
	case <-ctx.Done():
		return errors.Join(ctx.Err(), vm.giveUpMove())
	}
}

// giveUpMove ends a migration that nobody wants any more, so that the machine may go on.
func (vm *VM) giveUpMove() error {
	ctx, cancel := context.WithTimeout(context.Background(), restoreTimeout)
	defer cancel()
	if err := vm.qmp.execute(ctx, "migrate_cancel", nil, nil); err != nil {
		return err
	}
	select {
	case <-vm.moves.ended():
		return nil
	case <-vm.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("QMP migrate_cancel: %w", ctx.Err())
	}
}

// Save implements hypervisor.Snapshotter.
func (vm *VM) Save(ctx context.Context, state *os.File) error {
	if !vm.saves {
		return fmt.Errorf("save: the machine's memory is not in a file that outlives it (Config.Memory): %w", errdefs.ErrFailedPrecondition)
	}
	if err := vm.move(ctx, "migrate", state); err != nil {
		return fmt.Errorf("save: %w", err)
	}
	return nil
}

// Park implements hypervisor.Parker.
func (vm *VM) Park(ctx context.Context) error {
	if vm.vsock.serial == nil {
		return fmt.Errorf("park: vsock backend is %q, which QEMU does not save: want %q: %w", vm.vsock.backend, hypervisor.VsockSerial, errdefs.ErrFailedPrecondition)
	}
	if err := vm.vsock.serial.Detach(ctx); err != nil {
		return fmt.Errorf("park: %w", err)
	}
	return nil
}

// Continue implements hypervisor.Parker. QEMU takes the disks, which it has given
// up for the machine that was to follow, back.
func (vm *VM) Continue(ctx context.Context) error {
	if err := vm.qmp.execute(ctx, "cont", nil, nil); err != nil {
		return fmt.Errorf("continue: %w", err)
	}
	if err := vm.vsock.serial.Resume(ctx); err != nil {
		return fmt.Errorf("continue: %w", err)
	}
	return nil
}

// plugRest adds the devices that cannot be there while a state is loaded: what
// QEMU cannot save, and what is in a port, which the state says is empty. The
// guest finds them when it goes on.
func (s *start) plugRest(ctx context.Context) error {
	for i, d := range s.c.Disks {
		if s.c.Whole {
			break
		}
		if err := s.vm.qmp.execute(ctx, "device_add", diskDevice(d, diskPort(s.c, i)), nil); err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
	}
	for i, n := range s.c.NICs {
		if !plugsNICs(s.c) {
			break
		}
		if err := s.vm.qmp.execute(ctx, "device_add", nicDevice(n, len(s.c.Disks)+i), nil); err != nil {
			return fmt.Errorf("NIC %s: %w", n.ID, err)
		}
	}
	for i, sh := range s.c.Shares {
		err := s.vm.qmp.execute(ctx, "device_add", shareDevice(sh, fmt.Sprintf("fs%d", i), ports(s.c)+i), nil)
		if err != nil {
			return fmt.Errorf("share %s: %w", sh.Tag, err)
		}
	}
	return nil
}

// restore loads a saved machine's state and waits until its guest answers.
func (s *start) restore(ctx context.Context) error {
	if s.c.Restore == nil {
		return nil
	}
	var err error
	if s.c.MemoryFilled != nil { // what is loaded looks at queues in the memory
		err = s.c.MemoryFilled(ctx)
	}
	if err == nil {
		err = s.vm.move(ctx, "migrate-incoming", s.c.Restore)
	}
	if err == nil {
		err = s.plugRest(ctx)
	}
	if err == nil {
		err = s.vm.qmp.execute(ctx, "cont", nil, nil)
	}
	if errors.Is(err, errQMPClosed) || errors.Is(err, syscall.EPIPE) {
		<-s.vm.done
		err = s.vm.endErr()
	}
	if err != nil {
		return err
	}
	limit := time.NewTimer(restoreTimeout)
	defer limit.Stop()
	select {
	case <-s.vm.vsock.serial.Ready():
		return nil
	case <-s.vm.vsock.serial.Done():
		return fmt.Errorf("the restored guest does not answer: %w", s.vm.vsock.serial.Err())
	case <-limit.C:
		return fmt.Errorf("the restored guest does not answer within %v", restoreTimeout)
	case <-ctx.Done():
		return ctx.Err()
	}
}
