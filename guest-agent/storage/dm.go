// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The device mapper's control interface (kernel include/uapi/linux/dm-ioctl.h).
const (
	dmControl     = "/dev/mapper/control"
	dmHeaderBytes = 312 // struct dm_ioctl
	dmTargetBytes = 40  // struct dm_target_spec
	dmBufferBytes = 4096

	dmDevCreate   = 0xc138fd03
	dmDevRemove   = 0xc138fd04
	dmDevSuspend  = 0xc138fd06 // without dmSuspend it resumes
	dmTableLoad   = 0xc138fd09
	dmTableStatus = 0xc138fd0c

	dmReadOnly       = 1 << 0
	dmDeferredRemove = 1 << 17
)

// Offsets in struct dm_ioctl.
const (
	dmSizeAt    = 12
	dmStartAt   = 16
	dmTargetsAt = 20
	dmFlagsAt   = 28
	dmDevAt     = 40
	dmNameAt    = 48
	dmNameBytes = 128
)

// dmTarget is the only line of a table: what the device's sectors are.
type dmTarget struct {
	sectors      uint64
	kind, params string
}

// dmCall makes one call about the device of that name and returns the answer.
func dmCall(request uintptr, name string, flags uint32, target *dmTarget) ([]byte, error) {
	if len(name) >= dmNameBytes {
		return nil, fmt.Errorf("device name %q is too long", name)
	}
	b := make([]byte, dmBufferBytes)
	le := binary.NativeEndian
	le.PutUint32(b, 4) // version of the interface, 4.0.0
	le.PutUint32(b[dmSizeAt:], uint32(len(b)))
	le.PutUint32(b[dmStartAt:], dmHeaderBytes)
	le.PutUint32(b[dmFlagsAt:], flags)
	copy(b[dmNameAt:], name)
	if target != nil {
		if dmHeaderBytes+dmTargetBytes+len(target.params) >= len(b) {
			return nil, fmt.Errorf("table of %d bytes is too long", len(target.params))
		}
		le.PutUint32(b[dmTargetsAt:], 1)
		t := b[dmHeaderBytes:]
		le.PutUint64(t[8:], target.sectors)
		copy(t[24:], target.kind)
		copy(t[dmTargetBytes:], target.params)
	}
	f, err := os.OpenFile(dmControl, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&b[0]))); e != 0 {
		return nil, e
	}
	return b, nil
}

// dmCreate makes a read-only device of one target and returns its number's minor
// part, which names its node.
func dmCreate(name string, t dmTarget) (minor uint32, err error) {
	b, err := dmCall(dmDevCreate, name, 0, nil)
	if err != nil {
		return 0, fmt.Errorf("create device %s: %w", name, err)
	}
	minor = unix.Minor(binary.NativeEndian.Uint64(b[dmDevAt:]))
	if _, err = dmCall(dmTableLoad, name, dmReadOnly, &t); err != nil {
		return 0, errors.Join(fmt.Errorf("load the table of device %s (%s): %w", name, t.params, err), dmRemove(name))
	}
	if _, err = dmCall(dmDevSuspend, name, 0, nil); err != nil {
		return 0, errors.Join(fmt.Errorf("resume device %s: %w", name, err), dmRemove(name))
	}
	return minor, nil
}

// dmRemove removes a device, once nobody uses it any more.
func dmRemove(name string) error {
	if _, err := dmCall(dmDevRemove, name, dmDeferredRemove, nil); err != nil && !errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("remove device %s: %w", name, err)
	}
	return nil
}

// dmStatus is what the device's target says of itself.
func dmStatus(name string) (string, error) {
	b, err := dmCall(dmTableStatus, name, 0, nil)
	if err != nil {
		return "", fmt.Errorf("status of device %s: %w", name, err)
	}
	start := int(binary.NativeEndian.Uint32(b[dmStartAt:])) + dmTargetBytes
	if start < dmTargetBytes || start >= len(b) {
		return "", fmt.Errorf("status of device %s: it begins at byte %d", name, start)
	}
	text, _, _ := bytes.Cut(b[start:], []byte{0})
	return string(text), nil
}
