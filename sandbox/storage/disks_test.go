// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/hypervisor"
)

// plugVM is a machine that only takes disks.
type plugVM struct {
	hypervisor.VM
	mu      sync.Mutex
	disks   map[string]bool // guarded by mu
	plugged int             // guarded by mu
	fail    error           // guarded by mu; of the next calls
	hold    chan struct{}   // when set, a call waits for it
	entered chan struct{}   // gets one for each call when set
}

func newPlugVM() *plugVM { return &plugVM{disks: map[string]bool{}} }

func (vm *plugVM) wait() {
	if vm.entered != nil {
		vm.entered <- struct{}{}
	}
	if vm.hold != nil {
		<-vm.hold
	}
}

func (vm *plugVM) PlugDisk(_ context.Context, d hypervisor.Disk) (string, error) {
	defer d.Close()
	vm.wait()
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.fail != nil {
		return "", vm.fail
	}
	vm.disks[d.ID] = true
	vm.plugged++
	return "place of " + d.ID, nil
}

func (vm *plugVM) UnplugDisk(_ context.Context, id string) error {
	vm.wait()
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.fail != nil {
		return vm.fail
	}
	delete(vm.disks, id)
	return nil
}

func (vm *plugVM) state() string {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return fmt.Sprintf("%d of %d", len(vm.disks), vm.plugged)
}

func source(t *testing.T, d *Disks, name string) *Source {
	t.Helper()
	path := filepath.Join(os.TempDir(), fmt.Sprintf("kata-disks-test-%d-%s", os.Getpid(), name))
	if _, err := os.Stat(path); err != nil {
		must(t, os.WriteFile(path, []byte("x"), 0o600))
		t.Cleanup(func() { os.Remove(path) })
	}
	s, err := d.OpenSource(path, true)
	must(t, err)
	return s
}

// TestDisksAreCounted: the first user attaches, the last one detaches.
func TestDisksAreCounted(t *testing.T) {
	ctx, vm, d := context.Background(), newPlugVM(), NewDisks()
	open := len(openFiles(t))
	for _, user := range []string{"a", "b", "a"} {
		if place, err := d.Attach(ctx, vm, user, source(t, d, "one")); err != nil || place != "place of disk0" {
			t.Fatalf("%q, %v", place, err)
		}
	}
	must(t, d.Release(ctx, vm, "a"))
	must(t, d.Release(ctx, vm, "a"))
	if got := vm.state(); got != "1 of 1" {
		t.Errorf("with one user: %s", got)
	}
	must(t, d.Release(ctx, vm, "b"))
	if got := vm.state(); got != "0 of 1" || d.Attached() != 0 {
		t.Errorf("without users: %s, %d", got, d.Attached())
	}
	if place, err := d.Attach(ctx, vm, "c", source(t, d, "one")); err != nil || place != "place of disk1" {
		t.Errorf("again: %q, %v", place, err)
	}
	if now := len(openFiles(t)); now != open {
		t.Errorf("%d files are open, %d before", now, open)
	}
}

// TestDisksOfTheFirstContainer come with the machine.
func TestDisksOfTheFirstContainer(t *testing.T) {
	ctx, vm, d := context.Background(), newPlugVM(), NewDisks()
	boot := d.Boot("first", []*Source{source(t, d, "one"), source(t, d, "two"), source(t, d, "one")})
	if len(boot) != 2 || boot[0].ID == boot[1].ID {
		t.Fatalf("%+v", boot)
	}
	d.Booted([]string{"p0", "p1"}, nil)
	for _, b := range boot {
		b.Close()
	}
	for name, want := range map[string]string{"one": "p0", "two": "p1"} {
		if place, err := d.Attach(ctx, vm, "first", source(t, d, name)); err != nil || place != want {
			t.Errorf("%s: %q, %v", name, place, err)
		}
	}
	must(t, d.Release(ctx, vm, "first"))
	if d.Attached() != 0 || vm.state() != "0 of 0" {
		t.Errorf("%d disks, machine %s", d.Attached(), vm.state())
	}
}

// TestAttachWhileDetaching: who comes while a disk goes waits, and gets it anew.
func TestAttachWhileDetaching(t *testing.T) {
	ctx, vm, d := context.Background(), newPlugVM(), NewDisks()
	_, err := d.Attach(ctx, vm, "a", source(t, d, "one"))
	must(t, err)
	vm.hold, vm.entered = make(chan struct{}), make(chan struct{}, 9)
	released, attached := make(chan error, 1), make(chan error, 1)
	go func() { released <- d.Release(ctx, vm, "a") }()
	<-vm.entered // the machine takes it out
	late := source(t, d, "one")
	go func() {
		_, err := d.Attach(ctx, vm, "b", late)
		attached <- err
	}()
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := d.Attach(cancelled, vm, "c", source(t, d, "one")); !errors.Is(err, context.Canceled) {
		t.Errorf("a call that was given up: %v", err)
	}
	close(vm.hold)
	must(t, errors.Join(<-released, <-attached))
	if got := vm.state(); got != "1 of 2" {
		t.Errorf("the machine has %s", got)
	}
	must(t, d.Release(ctx, vm, "b"))
}

// TestDisksAtOnce: init and main containers come and go at the same time.
func TestDisksAtOnce(t *testing.T) {
	ctx, vm, d := context.Background(), newPlugVM(), NewDisks()
	var wg sync.WaitGroup
	source(t, d, "one").Close() // made before, removed after all of them
	for user := range 8 {
		wg.Go(func() {
			for range 50 {
				name := fmt.Sprint(user)
				if _, err := d.Attach(ctx, vm, name, source(t, d, "one")); err != nil {
					t.Error(err)
				}
				if err := d.Release(ctx, vm, name); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if d.Attached() != 0 || !strings.HasPrefix(vm.state(), "0 of ") {
		t.Errorf("%d disks, machine %s", d.Attached(), vm.state())
	}
}

// TestDiskFailures: a disk that could not be attached is forgotten; one that could
// not be detached is held on, and can be tried again.
func TestDiskFailures(t *testing.T) {
	ctx, vm, d := context.Background(), newPlugVM(), NewDisks()
	vm.fail = errors.New("full")
	if _, err := d.Attach(ctx, vm, "a", source(t, d, "one")); !errors.Is(err, vm.fail) {
		t.Errorf("attach: %v", err)
	}
	must(t, d.Release(ctx, vm, "a"))
	if d.Attached() != 0 {
		t.Error("a disk that was not attached is remembered")
	}
	vm.fail = nil
	_, err := d.Attach(ctx, vm, "a", source(t, d, "one"))
	must(t, err)
	vm.fail = errors.New("busy")
	if err := d.Release(ctx, vm, "a"); !errors.Is(err, vm.fail) {
		t.Errorf("release: %v", err)
	}
	vm.fail = nil
	must(t, d.Release(ctx, vm, "a"))
	if vm.state() != "0 of 1" || d.Attached() != 0 {
		t.Errorf("machine %s, %d disks", vm.state(), d.Attached())
	}
	if _, err := d.Attach(ctx, struct{ hypervisor.VM }{}, "a", source(t, d, "one")); !errdefs.IsNotImplemented(err) {
		t.Errorf("a machine that takes no disks: %v", err)
	}
	must(t, d.Release(ctx, vm, "a"))
	s := source(t, d, "one")
	s.ReadOnly = false
	_, err = d.Attach(ctx, vm, "a", s)
	must(t, err)
	if _, err := d.Attach(ctx, vm, "b", source(t, d, "one")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("read-only and not: %v", err)
	}
}
