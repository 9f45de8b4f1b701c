// SPDX-License-Identifier: Apache-2.0

// Package identity makes a guest that was restored from a saved machine another
// one than its siblings: random numbers, machine id, time, devices. The boot id
// needs nothing: the kernel makes it when it is first read (random(4)), and
// nothing reads it before.
package identity

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/internal/channel"
)

// Paths of what is written.
const (
	machineID = "/etc/machine-id"
	rescan    = "/sys/bus/pci/rescan"
)

// Assume does what the host says: any guest gets its random bytes and time, a
// restored one becomes another guest, unless it is the same, and looks for the devices it was given, if
// the host says that no event tells of them.
// When it returns without an error no two guests share what it gave them.
func Assume(h channel.Hello) error {
	if err := Reseed(h.Entropy[:]); err != nil {
		return err
	}
	if !h.Restored {
		return nil
	}
	ts := unix.NsecToTimespec(h.Time.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("set the clock: %w", err)
	}
	if !h.Same {
		if err := newMachineID(machineID); err != nil {
			return err
		}
	}
	if !h.Scan {
		return nil
	}
	if err := os.WriteFile(rescan, []byte("1"), 0); err != nil {
		return fmt.Errorf("look for devices: %w", err)
	}
	return nil
}

// newMachineID writes a random one (machine-id(5)); a guest without /etc has none.
// System calls alone, as in Reseed: what a restored guest runs here is run once, which an emulator
// pays for by the amount of code, and the libraries' way is four times as long
// (docs/decisions.md, "Clones: where a start's time goes without KVM").
func newMachineID(path string) error {
	var id [16]byte
	// Never fewer: they are at most 256 (getrandom(2)). Not the vDSO's: it maps a page for each thread.
	if _, _, errno := unix.Syscall(unix.SYS_GETRANDOM, uintptr(unsafe.Pointer(&id[0])), uintptr(len(id)), 0); errno != 0 {
		return fmt.Errorf("machine id: %w", os.NewSyscallError("getrandom", errno))
	}
	id[6] = id[6]&0x0f | 0x40 // a version 4 UUID, as systemd makes them
	id[8] = id[8]&0x3f | 0x80
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_CLOEXEC, 0o444)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("machine id: %w", &os.PathError{Op: "open", Path: path, Err: err})
	}
	_, err = unix.Write(fd, append(hex.AppendEncode(nil, id[:]), '\n'))
	if err = errors.Join(err, unix.Close(fd)); err != nil {
		return fmt.Errorf("machine id: %w", &os.PathError{Op: "write", Path: path, Err: err})
	}
	return nil
}

// Reseed adds random bytes of the host to the kernel's pool and makes its
// generator use them at once (random(4)).
func Reseed(data []byte) error {
	const path = "/dev/random"
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	// struct rand_pool_info: int entropy_count in bits, int buf_size in bytes, data.
	buf := binary.NativeEndian.AppendUint32(nil, uint32(8*len(data)))
	buf = binary.NativeEndian.AppendUint32(buf, uint32(len(data)))
	buf = append(buf, data...)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&buf[0]))); errno != 0 {
		return fmt.Errorf("add entropy: %w", errno)
	}
	const rndReseedCRNG = 0x5207 // _IO('R', 0x07), include/uapi/linux/random.h
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), rndReseedCRNG, 0); errno != 0 {
		return fmt.Errorf("reseed: %w", errno)
	}
	return nil
}
