// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
)

// killTimeout bounds the wait for killed processes where the caller set no time:
// only one stuck in the kernel outlives SIGKILL.
const killTimeout = 10 * time.Second

// RemoveContainer kills what is left of a container and takes it apart. Output
// that the host has not read yet is waited for until ctx is done.
func (p *Pod) RemoveContainer(ctx context.Context, id string) error {
	c, err := p.Container(id)
	if err != nil {
		return err
	}
	if !c.removeMu.TryLock() {
		return fault.New(fault.FailedPrecondition, "container %s is being removed already", id)
	}
	defer c.removeMu.Unlock()
	c.mu.Lock()
	c.state = Stopped // from here on no Exec begins
	c.mu.Unlock()
	c.shut()
	if err := c.group.Kill(); err != nil {
		return fmt.Errorf("remove container %s: %w", id, err)
	}
	// An Exec that was under way may leave a process after this first kill.
	c.launches.Wait()
	if err := c.kill(ctx); err != nil {
		return fmt.Errorf("remove container %s: %w", id, err)
	}
	c.mu.Lock()
	c.drain = ctx
	c.mu.Unlock()
	c.end()
	c.watchers.Wait()
	p.dropPIDNS(c.init.PID())
	if err := c.takeApart(ctx); err != nil {
		return fmt.Errorf("remove container %s: %w", id, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.containers, id)
	return nil
}

func (c *Container) kill(ctx context.Context) error {
	if err := c.group.Kill(); err != nil {
		return err
	}
	if err := c.group.WaitEmpty(ctx); err != nil {
		return err
	}
	select {
	case <-c.init.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (c *Container) takeApart(ctx context.Context) error {
	if err := c.pod.cfg.Engine.Delete(ctx, c.ID, c.poststop); err != nil {
		return err
	}
	errs := []error{c.leaveShare()}
	for i := len(c.storages) - 1; i >= 0; i-- {
		errs = append(errs, c.pod.cfg.Storage.Remove(c.storages[i]))
	}
	c.storages = nil
	errs = append(errs, c.group.Remove(), os.RemoveAll(c.bundle))
	return errors.Join(errs...)
}

// Destroy ends the sandbox: every process is killed and dirty data of disks is
// written out. The machine is the host's to switch off, so what dies with it – mounts,
// cgroups, bundles – is not taken apart, except for a container whose hooks
// have a say in it.
func (p *Pod) Destroy(ctx context.Context) error {
	var errs []error
	for _, c := range p.Containers() {
		if c.poststop {
			errs = append(errs, p.RemoveContainer(ctx, c.ID))
		} else {
			errs = append(errs, c.quit(ctx))
		}
	}
	p.mu.Lock()
	p.active = false
	clear(p.containers)
	p.mu.Unlock()
	if anyDisk(blockDevices) {
		unix.Sync()
	}
	return errors.Join(errs...)
}

// blockDevices is where the kernel lists them (sysfs(5)).
const blockDevices = "/sys/block"

// anyDisk tells whether there is a block device with something behind it: without
// one nothing is left to write out. What is shared by virtio-fs was written before the
// processes ended, with every write or at the end of a mapping; to sync it is to have
// the host write out the whole file system that its files are on.
func anyDisk(dir string) bool {
	devices, err := os.ReadDir(dir)
	if err != nil {
		return true
	}
	for _, d := range devices {
		// In sectors; 0 for a loop device that nobody uses.
		if size, err := os.ReadFile(filepath.Join(dir, d.Name(), "size")); err != nil || string(size) != "0\n" {
			return true
		}
	}
	return false
}

// quit ends a container's processes for good. Those of one with a PID namespace of
// its own have ended with its first one (see processGone).
func (c *Container) quit(ctx context.Context) error {
	c.mu.Lock()
	c.state = Stopped // from here on no Exec begins
	c.mu.Unlock()
	c.shut()
	if c.init.exited() && !c.sharedPID {
		return nil
	}
	if err := c.kill(ctx); err != nil {
		return fmt.Errorf("end container %s: %w", c.ID, err)
	}
	return nil
}
