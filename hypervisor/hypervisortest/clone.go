// SPDX-License-Identifier: Apache-2.0

package hypervisortest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/guestsvc"
)

// clones saves a machine and runs two of it at once, which do not disturb each
// other or what was saved; then one on a copy, and one of a broken state.
func (s *suite) clones() {
	if !s.Saves {
		return
	}
	memory, state := s.file("memory"), s.file("state")
	defer memory.Close()
	defer state.Close()
	s.must(memory.Truncate(int64(s.Machine.MemoryBytes)))
	s.saved(memory, state)
	_, err := unix.FcntlInt(memory.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	s.must(err)
	before := s.digest(memory)
	a, b := s.clone("clone1", memory, state, true, "late"), s.clone("clone2", memory, state, true, "late")
	for i, vm := range []hypervisor.VM{a, b} {
		s.streams(vm, uint32(i+1))
	}
	if err := a.(hypervisor.Snapshotter).Save(s.context(), state); err == nil {
		s.Error("a machine was saved whose memory is its own")
	}
	s.stop(a)
	s.must(s.dialEcho(b, 9)) // goes on without its sibling
	s.stop(b)
	if s.digest(memory) != before {
		s.Error("clones have changed the memory that they share")
	}
	own := s.file("copy")
	defer own.Close()
	_, err = io.Copy(own, io.NewSectionReader(memory, 0, int64(s.Machine.MemoryBytes)))
	s.must(err)
	c := s.clone("clone3", own, state, false, "late", "later") // more than there are ports
	s.streams(c, 3)
	s.stop(c)
	u := s.cloneConfig("unsealed", own, state, true)
	u.ReclaimFreed = true
	var se *hypervisor.StartError
	if err := s.startFails(context.Background(), u); !errors.As(err, &se) || se.Phase != "config" {
		s.Errorf("memory that is given back, of a file that is not sealed: %v, want a *StartError of phase config", err)
	}
	s.brokenState(memory, state)
}

// saved boots a machine and saves it as it waits for its host.
func (s *suite) saved(memory, state *os.File) {
	s.Helper()
	c := s.serialConfig("saved")
	c.Memory = memory
	vm := s.start(c)
	s.ready(vm)
	saver, ok := vm.(hypervisor.Snapshotter)
	if !ok {
		s.Fatalf("%T is no Snapshotter", vm)
	}
	s.must(saver.Save(s.context(), state))
	s.stop(vm)
}

func (s *suite) serialConfig(id string) hypervisor.Config {
	c := s.config(id)
	c.Vsock, c.ReadyParam, c.HotplugPorts = hypervisor.VsockSerial, "", 2
	c.KernelParams = append(c.KernelParams[:len(c.KernelParams):len(c.KernelParams)], guestsvc.SerialParam)
	return c
}

func (s *suite) cloneConfig(id string, memory, state *os.File, private bool) hypervisor.Config {
	s.Helper()
	_, err := state.Seek(0, io.SeekStart)
	s.must(err)
	c := s.serialConfig(id)
	c.Memory, c.MemoryPrivate, c.Restore = memory, private, state
	return c
}

// clone restores a machine, which answers when Start returns, and has devices
// that the saved one did not have.
func (s *suite) clone(id string, memory, state *os.File, private bool, nics ...string) hypervisor.VM {
	s.Helper()
	c := s.cloneConfig(id, memory, state, private)
	for _, id := range nics {
		c.NICs = append(c.NICs, s.nic(id, 1))
	}
	vm := s.start(c)
	s.ready(vm)
	return vm
}

// streams tries both directions, an end, and a port that nobody listens on.
func (s *suite) streams(vm hypervisor.VM, seed uint32) {
	s.Helper()
	s.must(s.dialEcho(vm, seed))
	if _, err := vm.Dial(s.context(), guestsvc.ClosedPort); !errors.Is(err, unix.ECONNREFUSED) {
		s.Errorf("dial of a port nobody listens on: %v", err)
	}
	l, port := s.listen(vm, 0)
	answered := make(chan error, 1)
	go func() { answered <- s.accept(l, seed+100) }()
	if _, answer := s.dialBack(vm, port); answer != guestsvc.DialOK {
		s.Errorf("the guest's dial: %q", answer)
	}
	s.must(<-answered)
	s.must(l.Close())
	if _, answer := s.dialBack(vm, port); answer == guestsvc.DialOK {
		s.Error("the guest reaches a port that was closed")
	}
}

// brokenState checks that a state that is not whole is refused, and that nothing is left.
func (s *suite) brokenState(memory, state *os.File) {
	s.Helper()
	_, err := state.Seek(0, io.SeekStart)
	s.must(err)
	half := s.file("half")
	defer half.Close()
	st, err := state.Stat()
	s.must(err)
	_, err = io.CopyN(half, state, st.Size()/2)
	s.must(err)
	err = s.startFails(context.Background(), s.cloneConfig("broken", memory, half, true))
	var se *hypervisor.StartError
	if !errors.As(err, &se) || se.Phase != "restore" {
		s.Errorf("a state that ends early: %v, want a *StartError of phase restore", err)
	}
	c := s.cloneConfig("short", memory, state, true)
	c.MemoryBytes += 1 << 20
	if err := s.startFails(context.Background(), c); !errors.As(err, &se) || se.Phase != "config" {
		s.Errorf("memory of another size: %v, want a *StartError of phase config", err)
	}
}

// file is an anonymous file that can be sealed; the caller closes it.
func (s *suite) file(name string) *os.File {
	s.Helper()
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	s.must(err)
	return os.NewFile(uintptr(fd), name)
}

func (s *suite) digest(f *os.File) string {
	s.Helper()
	h := sha256.New()
	st, err := f.Stat()
	s.must(err)
	_, err = io.Copy(h, io.NewSectionReader(f, 0, st.Size()))
	s.must(err)
	return hex.EncodeToString(h.Sum(nil))
}
