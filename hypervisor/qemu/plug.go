// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/kata-v2/kata/hypervisor"
)

// plugs is what is plugged into a machine.
type plugs struct {
	mu    sync.Mutex
	ports []string                 // guarded by mu; ID of the device in each root port, empty for none
	nics  map[string]bool          // guarded by mu; ID of all NICs and disks, those of the command line included
	going map[string]chan struct{} // guarded by mu; closed when QEMU says that the device is gone
	files map[string][]int         // guarded by mu; by disk: the sets of its files
	set   int                      // guarded by mu; the next set's number
}

func newPlugs(c hypervisor.Config) *plugs {
	p := &plugs{ports: make([]string, ports(c)), nics: map[string]bool{}, going: map[string]chan struct{}{}, files: map[string][]int{}, set: firstPluggedSet}
	for i, n := range c.NICs {
		p.nics[n.ID] = true
		if plugsNICs(c) {
			p.ports[len(c.Disks)+i] = n.ID
		}
	}
	for i, d := range c.Disks {
		p.nics[d.ID], p.ports[diskPort(c, i)] = true, d.ID
	}
	return p
}

// take reserves a root port.
func (p *plugs) take(id string) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.nics[id] {
		return 0, fmt.Errorf("device %s is plugged in already", id)
	}
	for i, in := range p.ports {
		if in == "" {
			p.ports[i], p.nics[id] = id, true
			return i, nil
		}
	}
	if len(p.ports) == 0 {
		return 0, errors.New("the machine was started without a port for devices that are plugged in later; machine type microvm never has one, q35 has as many as HotplugPorts says")
	}
	return 0, fmt.Errorf("all %d ports for devices that are plugged into a running machine are in use", len(p.ports))
}

// free gives a device's port back.
func (p *plugs) free(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.nics, id)
	delete(p.files, id)
	for i, in := range p.ports {
		if in == id {
			p.ports[i] = ""
		}
	}
}

// nextSet is the number of a new set of files.
func (p *plugs) nextSet() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.set++
	return p.set
}

// remember notes the sets of a disk's files.
func (p *plugs) remember(id string, sets []int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.files[id] = sets
}

// sets are those that remember noted.
func (p *plugs) sets(id string) []int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.files[id]
}

// leave returns a channel that is closed when the device is gone, nil when there
// is no such device, and whether it is in a port.
func (p *plugs) leave(id string) (gone chan struct{}, plugged bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.nics[id] {
		return nil, false
	}
	if p.going[id] == nil {
		p.going[id] = make(chan struct{})
	}
	return p.going[id], slices.Contains(p.ports, id)
}

// deleted takes QEMU's DEVICE_DELETED event (qapi/qdev.json); one without a
// device's ID is about a part of a device.
func (p *plugs) deleted(data json.RawMessage) {
	var d struct {
		Device string `json:"device"`
	}
	if json.Unmarshal(data, &d) != nil || d.Device == "" {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if ch := p.going[d.Device]; ch != nil {
		close(ch)
		delete(p.going, d.Device)
	}
}

// PlugNIC implements hypervisor.NICPlugger.
func (vm *VM) PlugNIC(ctx context.Context, n hypervisor.NIC) (path string, err error) {
	defer n.Close() // QEMU has its own by the end
	if err := checkNIC(n); err != nil {
		return "", fmt.Errorf("plug: %w", err)
	}
	port, err := vm.plugs.take(n.ID)
	if err != nil {
		return "", fmt.Errorf("plug: %w", err)
	}
	if err := vm.plugNIC(ctx, n, port); err != nil {
		vm.plugs.free(n.ID)
		return "", fmt.Errorf("plug NIC %s: %w", n.ID, err)
	}
	return portPlace(port), nil
}

func (vm *VM) plugNIC(ctx context.Context, n hypervisor.NIC, port int) (err error) {
	var names []string
	undo := context.WithoutCancel(ctx)
	defer func() {
		if err == nil {
			return
		}
		for _, name := range names { // those that the netdev has taken are not known any more
			_ = vm.qmp.execute(undo, "closefd", map[string]any{"fdname": name}, nil)
		}
	}()
	pass := func(kind string, files []*os.File) (string, error) {
		var list []string
		for i, f := range files {
			name := n.ID + kind + strconv.Itoa(i)
			if err := vm.qmp.executeWith(ctx, "getfd", map[string]any{"fdname": name}, nil, f); err != nil {
				return "", err
			}
			names, list = append(names, name), append(list, name)
		}
		return strings.Join(list, ":"), nil
	}
	netdev := map[string]any{"type": "tap", "id": netdevID(n.ID)}
	if netdev["fds"], err = pass("tap", n.Taps); err != nil {
		return err
	}
	if len(n.Vhost) > 0 {
		netdev["vhost"] = true
		if netdev["vhostfds"], err = pass("vhost", n.Vhost); err != nil {
			return err
		}
	}
	if err := vm.qmp.execute(ctx, "netdev_add", netdev, nil); err != nil {
		return err
	}
	if err := vm.qmp.execute(ctx, "device_add", nicDevice(n, port), nil); err != nil {
		return errors.Join(err, vm.qmp.execute(undo, "netdev_del", map[string]any{"id": netdevID(n.ID)}, nil))
	}
	return nil
}

// UnplugNIC implements hypervisor.NICPlugger.
func (vm *VM) UnplugNIC(ctx context.Context, id string) error {
	gone, plugged := vm.plugs.leave(id)
	switch {
	case gone == nil:
		return nil
	case !plugged:
		if err := vm.qmp.execute(ctx, "set_link", map[string]any{"name": id, "up": false}, nil); err != nil {
			return fmt.Errorf("unplug NIC %s: %w", id, err)
		}
		return nil
	}
	if err := vm.deleteDevice(ctx, id, gone); err != nil {
		return fmt.Errorf("unplug NIC %s: %w", id, err)
	}
	if err := vm.qmp.execute(ctx, "netdev_del", map[string]any{"id": netdevID(id)}, nil); err != nil {
		return fmt.Errorf("unplug NIC %s: %w", id, err)
	}
	vm.plugs.free(id)
	return nil
}

// deleteDevice takes a device out of its port and waits until it is gone.
func (vm *VM) deleteDevice(ctx context.Context, id string, gone <-chan struct{}) error {
	if err := vm.qmp.execute(ctx, "device_del", map[string]any{"id": id}, nil); err != nil {
		return err
	}
	select {
	case <-gone:
		return nil
	case <-vm.done:
		return vm.endErr()
	case <-ctx.Done():
		return fmt.Errorf("the guest does not let go of it: %w", ctx.Err())
	}
}
