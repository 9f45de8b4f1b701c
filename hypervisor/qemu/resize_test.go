// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/hypervisor"
)

// monitor answers QMP in the place of QEMU. It has slots for four vCPUs, the
// first of which was there at boot.
type monitor struct {
	conn   net.Conn
	in     [4]bool
	size   uint64
	said   []string
	status int // of the guest's answers to eject requests
	refuse bool
	stuck  uint64        // bytes that the guest does not return
	looked chan struct{} // one for each look at the size of memory
}

func newMonitor(t *testing.T, accel string) (*VM, *monitor) {
	ours, theirs := net.Pipe()
	m := &monitor{conn: theirs, in: [4]bool{true}, looked: make(chan struct{}, 100)}
	c := hypervisor.Config{CPUs: 1, MaxCPUs: 4, MemoryBytes: 128 << 20, MaxMemoryBytes: 512 << 20}
	vm := &VM{done: make(chan struct{}), plugs: newPlugs(c), sizes: newSizes(c, accel == TCG)}
	vm.qmp = newQMP(ours, vm.qmpEvent)
	ended := make(chan struct{})
	go func() { defer close(ended); m.serve() }()
	t.Cleanup(func() { vm.qmp.close(); theirs.Close(); <-ended })
	return vm, m
}

func (m *monitor) serve() {
	lines := bufio.NewScanner(m.conn)
	for lines.Scan() {
		var c struct {
			Execute   string
			Arguments map[string]any
			ID        uint64
		}
		if json.Unmarshal(lines.Bytes(), &c) != nil {
			return
		}
		answer, events := m.answer(c.Execute, c.Arguments)
		out := fmt.Sprintf("{\"return\": %s, \"id\": %d}\n%s", answer, c.ID, events)
		if _, err := m.conn.Write([]byte(out)); err != nil {
			return
		}
	}
}

func (m *monitor) answer(command string, args map[string]any) (answer, events string) {
	switch command {
	case "query-hotpluggable-cpus":
		var l []string
		for i, in := range slices.Backward(m.in[:]) { // as QEMU does, the last one first
			path := ""
			switch {
			case i == 0:
				path = `, "qom-path": "/machine/unattached/device[0]"`
			case in:
				path = fmt.Sprintf(`, "qom-path": "/machine/peripheral/cpu-0-%d-0"`, i)
			}
			l = append(l, fmt.Sprintf(`{"type": "max-x86_64-cpu", "props": {"core-id": %d, "thread-id": 0, "socket-id": 0}%s}`, i, path))
		}
		return "[" + strings.Join(l, ",") + "]", ""
	case "device_add":
		i := int(args["core-id"].(float64))
		m.in[i] = true
		m.said = append(m.said, fmt.Sprintf("add %v %v", args["driver"], args["id"]))
	case "device_del":
		var i int
		fmt.Sscanf(args["id"].(string), "cpu-0-%d-0", &i)
		m.said = append(m.said, "del "+args["id"].(string))
		m.in[i] = m.refuse || m.status != 0
		const event = `{"event": "ACPI_DEVICE_OST", "data": {"info": {"slot": "%d", "slot-type": "CPU", "source": 3, "status": %d}}}` + "\n"
		return "{}", fmt.Sprintf(event+event, i, 0x84, i, m.status)
	case "qom-set":
		m.size = max(m.stuck, uint64(args["value"].(float64)))
		return "{}", fmt.Sprintf(`{"event": "MEMORY_DEVICE_SIZE_CHANGE", "data": {"id": "vmem", "size": %d}}`+"\n", m.size)
	case "qom-get":
		m.looked <- struct{}{}
		return fmt.Sprint(m.size), ""
	}
	return "{}", ""
}

func TestResizeCPUs(t *testing.T) {
	ctx := context.Background()
	vm, m := newMonitor(t, KVM)
	resize := func(n, want int, is func(error) bool) {
		t.Helper()
		have, err := vm.ResizeCPUs(ctx, n)
		if have != want || (is == nil) != (err == nil) || is != nil && !is(err) {
			t.Errorf("resize to %d: have %d, %v; want %d", n, have, err, want)
		}
	}
	resize(3, 3, nil)
	resize(3, 3, nil)
	resize(1, 1, nil)
	resize(2, 2, nil)
	want := "add max-x86_64-cpu cpu-0-1-0, add max-x86_64-cpu cpu-0-2-0, del cpu-0-2-0, del cpu-0-1-0, add max-x86_64-cpu cpu-0-1-0"
	if got := strings.Join(m.said, ", "); got != want {
		t.Errorf("QEMU was told\n%s; want\n%s", got, want)
	}
	m.status = 0x81 // busy
	resize(1, 2, errdefs.IsFailedPrecondition)
	m.status, m.refuse = 0, true // the guest lies
	resize(1, 2, errdefs.IsFailedPrecondition)
	for _, n := range []int{-1, 0, 5} {
		if _, err := vm.ResizeCPUs(ctx, n); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "from 1 to 4") {
			t.Errorf("%d vCPUs: %v", n, err)
		}
	}
}

// Without KVM all vCPUs are there from the start.
func TestResizeCPUsWithoutKVM(t *testing.T) {
	vm, m := newMonitor(t, TCG)
	for _, n := range []int{2, 1, 4} {
		if have, err := vm.ResizeCPUs(context.Background(), n); have != n || err != nil {
			t.Errorf("resize to %d: have %d, %v", n, have, err)
		}
	}
	if _, err := vm.ResizeCPUs(context.Background(), 5); !errdefs.IsInvalidArgument(err) {
		t.Errorf("one too many: %v", err)
	}
	if len(m.said) != 0 {
		t.Errorf("QEMU was told %v", m.said)
	}
}

func TestResizeMemory(t *testing.T) {
	vm, m := newMonitor(t, TCG)
	const mib = 1 << 20
	for _, c := range []struct{ ask, want uint64 }{
		{128*mib + 1, 132 * mib}, {512 * mib, 512 * mib}, {300 * mib, 300 * mib}, {128 * mib, 128 * mib},
	} {
		if have, err := vm.ResizeMemory(context.Background(), c.ask); have != c.want || err != nil {
			t.Errorf("resize to %d: have %d, %v; want %d", c.ask, have, err, c.want)
		}
	}
	for _, n := range []uint64{0, 127 * mib, 513 * mib, 1 << 63} {
		if _, err := vm.ResizeMemory(context.Background(), n); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	// A guest that keeps some: the caller learns how much when its time is over.
	m.stuck = 8 * mib
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	vm.sizes.turn <- struct{}{}
	if _, err := vm.ResizeMemory(ctx, 128*mib); err == nil {
		t.Error("two changes at a time")
	}
	<-vm.sizes.turn
	ctx, cancel = context.WithCancel(context.Background())
	defer cancel()
	for len(m.looked) > 0 {
		<-m.looked
	}
	result := make(chan error, 1)
	var have uint64
	go func() {
		var err error
		have, err = vm.ResizeMemory(ctx, 128*mib)
		result <- err
	}()
	<-m.looked
	cancel()
	if err := <-result; err == nil || have != 136*mib || !strings.Contains(err.Error(), fmt.Sprint(136*mib)) {
		t.Errorf("have %d, %v; want 136 MiB, the wish unfulfilled", have, err)
	}
}
