// SPDX-License-Identifier: Apache-2.0

// Package hypervisor is the contract between the pod and the virtual machine
// monitor that runs it. A backend (hypervisor/qemu) implements Hypervisor and
// VM; what not every backend can do is a separate small interface found by type
// assertion. hypervisortest holds the conformance suite that every backend and
// the in-memory fake pass.
package hypervisor

import (
	"context"
	"net"
	"os"
)

// Hypervisor starts virtual machines.
type Hypervisor interface {
	// Start boots the machine that c describes. It returns once the VMM process
	// runs and answers its control channel; the guest may still be booting
	// (see ReadyWaiter). On error nothing is left behind and the error, a
	// *StartError, carries the phase, the VMM's stderr and the console tail.
	// ctx bounds Start only; the machine lives until Stop or its own end.
	Start(ctx context.Context, c Config) (VM, error)
}

// VM is one running machine.
type VM interface {
	// Dial connects to a vsock port of the guest. It waits for the guest's
	// driver to come up; a guest that has no listener refuses at once with
	// ECONNREFUSED (wrapped in *net.OpError). The local address of the
	// connection is a vsock.Addr whose Port the guest sees as the peer's.
	Dial(ctx context.Context, port uint32) (net.Conn, error)
	// Listen accepts connections that the guest opens to a vsock port of the
	// host; 0 picks a free port. Only streams of this machine's guest come out of
	// it. With VsockVhost the ports belong to the whole host: one that another
	// machine listens on is EADDRINUSE.
	Listen(port uint32) (net.Listener, error)
	// Stop ends the machine: the guest is expected to have synced by then. It
	// returns when the VMM process is gone, and is idempotent. ctx bounds the
	// orderly way; when it is done the process is killed.
	Stop(ctx context.Context) error
	// Done is closed once, when the VMM process is gone.
	Done() <-chan struct{}
	// Err says why the machine ended; nil before Done and after an orderly Stop.
	Err() error
	// Info describes the running machine.
	Info() Info
}

// ReadyWaiter is implemented by machines that were started with Config.ReadyParam.
type ReadyWaiter interface {
	// WaitReady returns when the guest has dialled the ready port, ctx is done,
	// or the machine is gone, whichever is first.
	WaitReady(ctx context.Context) error
}

// NICPlugger is implemented by machines that take network devices while they
// run, up to Config.HotplugPorts at a time. The guest must have booted.
type NICPlugger interface {
	// PlugNIC adds a device and returns its place in the guest: the PCI slots from
	// the root bus down, two hexadecimal digits each, "08/00". The guest may not
	// have found it yet. On error the device is not there and its files are closed.
	PlugNIC(ctx context.Context, n NIC) (path string, err error)
	// UnplugNIC takes the device with that ID out and returns when the guest has
	// let go of it. One of Config.NICs may stay in the guest, without a carrier. A
	// device that is not there is no error.
	UnplugNIC(ctx context.Context, id string) error
}

// SharePlugger is implemented by machines that take a virtio-fs device while they
// run, in one of Config.HotplugPorts. The guest must have booted, and its memory
// must not be private (Config.ShareLater).
type SharePlugger interface {
	// PlugShare adds a device, whose daemon must be serving: it is asked for what it
	// can do. The guest may not have found it yet. On error the device is not there.
	// The connection belongs to the machine or is closed.
	PlugShare(ctx context.Context, s Share) error
}

// CPUThreader is implemented by machines whose vCPUs are threads of the host.
type CPUThreader interface {
	// CPUThreads lists the thread ids of the vCPUs that the machine has now, each once.
	CPUThreads(ctx context.Context) ([]int, error)
}

// Snapshotter is implemented by machines whose state can be saved.
type Snapshotter interface {
	// Save stops the guest where it is and writes the state of its devices, without
	// its memory, to state. The memory is in Config.Memory, which must not be
	// private. The machine is of no more use: end it before the memory is used, or
	// Continue it after (Parker).
	Save(ctx context.Context, state *os.File) error
}

// Parker is implemented by machines whose guest can be saved with what runs in it,
// and can go on afterwards, here or in a machine that is restored.
type Parker interface {
	// Park ends every stream in order and returns when the guest waits for a host;
	// Dial waits meanwhile. What was sent and not read is lost. Save may follow.
	Park(ctx context.Context) error
	// Continue undoes Park, and Save too: the guest runs and streams can be opened.
	Continue(ctx context.Context) error
}

// HugePage is the size of the huge pages for guest memory, in bytes.
const HugePage = 2 << 20

// Config is a complete, immutable description of a machine.
type Config struct {
	// ID names the machine in logs and process titles; it is the sandbox id.
	ID string
	// Dir is an existing directory for the machine's own files (sockets).
	// The backend leaves nothing in it after the machine is gone.
	Dir string
	// Kernel and Initrd are host paths; Initrd may be empty.
	Kernel, Initrd string
	// KernelParams are appended to what the backend itself needs, in order; the last one wins.
	KernelParams []string
	// ReadyParam, when not empty, makes the backend open a listener before the
	// guest runs and append "<ReadyParam>=<port>" to the kernel command line.
	ReadyParam string
	// CPUs is the number of vCPUs at boot, at least 1; MaxCPUs the most it can grow to.
	CPUs, MaxCPUs int
	// MemoryBytes is the guest's memory at boot, a multiple of 1 MiB.
	MemoryBytes uint64
	// MaxMemoryBytes is the most that it can grow to (MemoryResizer). At most
	// MemoryBytes, 0 for example, means that it cannot.
	MaxMemoryBytes uint64
	// ReclaimFreed gives memory that the guest frees back to the host. It does so by
	// punching holes into the memory's file: one of which MemoryPrivate is a view must be
	// sealed against that (F_SEAL_WRITE), and only what the machine was given later comes back.
	ReclaimFreed bool
	// HugePages takes the guest's memory from the host's huge pages, Prealloc takes
	// all of it at the start and what comes later when it comes; HugePages does so
	// too. Sizes are then multiples of HugePage. Neither goes with Memory or ReclaimFreed.
	HugePages, Prealloc bool
	// Memory, of MemoryBytes, holds the guest's memory; nil for memory that nobody
	// else sees. The caller keeps it open; others may write to it only when the
	// machine does. MemoryPrivate makes the guest's writes its own, so that many
	// machines may have one file, and goes without Shares and vhost-user devices.
	Memory        *os.File
	MemoryPrivate bool
	// MemoryFilled, when set, waits until Memory holds what Restore needs: the VMM
	// is started meanwhile. It ends with ctx.
	MemoryFilled func(ctx context.Context) error
	// Restore is what Save has written of a machine of the same Config, except for
	// ID, Dir, Shares, NICs and what says where and how the VMM runs. The guest goes
	// on where it was saved, with the memory it had then in Memory, and finds devices
	// that it did not have. Start returns when it answers, as another guest than
	// the saved one: see channel.Hello. It goes with VsockSerial alone.
	Restore *os.File
	// Whole says that the restored machine has the very NICs and Disks of the saved
	// one, in the same order: they go on with the rest, as does the guest, which is
	// the one that was saved and not a copy.
	Whole bool
	// Shares are the virtio-fs devices of the machine.
	Shares []Share
	// ShareLater says that a share may be plugged in (SharePlugger): MemoryPrivate is
	// not for such a machine.
	ShareLater bool
	// NICs are the network devices of the machine, in the order in which the guest finds them.
	NICs []NIC
	// Disks are the disks of the machine at boot; they can be unplugged.
	Disks []Disk
	// HotplugPorts is how many devices can be plugged into the running machine at
	// a time (NICPlugger, DiskPlugger, SharePlugger).
	HotplugPorts int
	// Vsock chooses the backend of the vsock device.
	Vsock VsockBackend
	// Network tells in which network namespace the VMM process runs.
	Network NetNS
	// UID and GID are what the VMM process runs as; zero keeps the shim's own.
	UID, GID uint32
	// Started, when set, is called with the pid of every process that the backend
	// starts, before that process may do work. A failure fails Start.
	Started func(name string, pid int) error
}

// Share is one virtio-fs device. Conn is a connected Unix socket to its daemon;
// the backend owns it once Start is called.
type Share struct {
	Tag  string
	Conn *os.File
}

// NIC is one network device. The guest's driver sees as many queue pairs as there
// are taps. The backend owns the files once Start or PlugNIC is called.
type NIC struct {
	// ID names the device; it is unique in its machine and of letters and digits.
	ID string
	// MAC is the guest's hardware address.
	MAC net.HardwareAddr
	// Taps are the queues of a tap or macvtap device that has virtio-net headers (IFF_VNET_HDR).
	Taps []*os.File
	// Vhost are open /dev/vhost-net, as many as Taps, or none for a device that the VMM itself serves.
	Vhost []*os.File
}

// Close closes the files of a NIC that no backend has taken over.
func (n NIC) Close() {
	for _, f := range append(n.Taps[:len(n.Taps):len(n.Taps)], n.Vhost...) {
		f.Close()
	}
}

// VsockBackend names an implementation of the vsock device.
type VsockBackend string

// The vsock backends.
const (
	VsockAuto      VsockBackend = "auto"       // vhost when /dev/vhost-vsock opens, else vhost-user
	VsockVhost     VsockBackend = "vhost"      // kernel vhost-vsock
	VsockVhostUser VsockBackend = "vhost-user" // the device of hypervisor/vsock, inside this process
	VsockSerial    VsockBackend = "serial"     // no vsock: streams over a virtio-serial port, so that the machine can be saved
)

// NetNS chooses the VMM's network namespace: the one bound at Path; without a
// path the shim's own when Host is set, else a new one that dies with the VMM.
type NetNS struct {
	Path string
	Host bool
}

// Info describes a running machine.
type Info struct {
	// PID of the VMM process; /proc/<PID>/ns/net is the pod's network namespace.
	PID int
	// Accelerator in use, "kvm" or "tcg".
	Accelerator string
	// CPUs is how many vCPUs the guest begins with; it brings the others of
	// Config.CPUs up when it is told to.
	CPUs int
	// Vsock is the backend in use, never VsockAuto.
	Vsock VsockBackend
	// NICs are the places in the guest of Config.NICs, as PlugNIC returns them.
	NICs []string
	// Disks are the places in the guest of Config.Disks, as PlugDisk returns them.
	Disks []string
	// Console returns the last bytes that the guest wrote to its console.
	ConsoleTail func() string
}

// StartError says why a machine did not start.
type StartError struct {
	// Phase is what was being done: "config", "vsock", "exec", "qmp", "restore", "boot".
	Phase string
	// Err is the cause.
	Err error
	// Stderr and Console are the last lines of the VMM and of the guest.
	Stderr, Console string
}

func (e *StartError) Error() string {
	s := "start VM: " + e.Phase + ": " + e.Err.Error()
	if e.Stderr != "" {
		s += "; VMM stderr: " + e.Stderr
	}
	if e.Console != "" {
		s += "; guest console: " + e.Console
	}
	return s
}

func (e *StartError) Unwrap() error { return e.Err }
