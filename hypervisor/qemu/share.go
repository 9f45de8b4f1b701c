// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"

	"github.com/kata-v2/kata/hypervisor"
)

// PlugShare implements hypervisor.SharePlugger.
func (vm *VM) PlugShare(ctx context.Context, s hypervisor.Share) error {
	defer s.Conn.Close() // QEMU has its own by the end
	if vm.private {
		return fmt.Errorf("plug share %s: the machine was started with memory that no daemon can see, since nobody had said that files would be shared", s.Tag)
	}
	id := "share" + s.Tag
	port, err := vm.plugs.take(id)
	if err != nil {
		return fmt.Errorf("plug share %s: %w", s.Tag, err)
	}
	if err := vm.plugShare(ctx, s, id, port); err != nil {
		vm.plugs.free(id)
		return fmt.Errorf("plug share %s: %w", s.Tag, err)
	}
	return nil
}

// plugShare hands QEMU the connection and makes the device (QEMU qapi/char.json,
// chardev-add; docs/system/devices/vhost-user.rst).
func (vm *VM) plugShare(ctx context.Context, s hypervisor.Share, id string, port int) error {
	undo := context.WithoutCancel(ctx)
	if err := vm.qmp.executeWith(ctx, "getfd", map[string]any{"fdname": id}, nil, s.Conn); err != nil {
		return err
	}
	err := vm.qmp.execute(ctx, "chardev-add", map[string]any{"id": id + "chr", "backend": map[string]any{
		"type": "socket", "data": map[string]any{"server": false, "addr": map[string]any{"type": "fd", "data": map[string]any{"str": id}}},
	}}, nil)
	if err != nil {
		return errors.Join(err, vm.qmp.execute(undo, "closefd", map[string]any{"fdname": id}, nil))
	}
	device := shareDevice(s, id+"chr", port)
	device["id"] = id
	if err := vm.qmp.execute(ctx, "device_add", device, nil); err != nil {
		return errors.Join(err, vm.qmp.execute(undo, "chardev-remove", map[string]any{"id": id + "chr"}, nil))
	}
	return nil
}

// shareDevice is a share's argument of device_add.
func shareDevice(s hypervisor.Share, chardev string, port int) map[string]any {
	return map[string]any{
		"driver": "vhost-user-fs-pci", "chardev": chardev, "tag": s.Tag, "queue-size": shareQueue, "bus": portID(port), "addr": "0",
	}
}
