// SPDX-License-Identifier: Apache-2.0

package network

import (
	"bytes"
	"context"
	"crypto/rand"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/sandbox/ledger"
)

// place is a pod's namespace, and another one that is its outside.
type place struct {
	t            *testing.T
	pod, outside string // names
	ledger       *ledger.Ledger
	root         string
}

func (p place) path() string { return "/run/netns/" + p.pod }

func newPlace(t *testing.T) place {
	t.Helper()
	suffix := strings.ToLower(rand.Text()[:8])
	p := place{t: t, pod: "kata-net-" + suffix, outside: "kata-out-" + suffix, root: filepath.Join(t.TempDir(), "state")}
	for _, n := range []string{p.pod, p.outside} {
		p.run("ip", "netns", "add", n)
		t.Cleanup(func() { p.run("ip", "netns", "del", n) })
		// Silent: what the kernel sends and gives itself is not part of the test.
		p.run("ip", "netns", "exec", n, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
	}
	var err error
	if p.ledger, err = ledger.Create(p.root, "key", ledger.Meta{Sandbox: "pod"}); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p place) run(args ...string) string {
	p.t.Helper()
	var stderr strings.Builder
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stderr = &stderr // ip has something to say now and then when it succeeds, too
	out, err := cmd.Output()
	if err != nil {
		p.t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}

func (p place) ip(args ...string) string {
	p.t.Helper()
	return p.run(append([]string{"ip", "-n", p.pod}, args...)...)
}

func (p place) tc(args ...string) string {
	p.t.Helper()
	return p.run(append([]string{"ip", "netns", "exec", p.pod, "tc"}, args...)...)
}

// veth makes a device whose peer, of the same name, is outside.
func (p place) veth(name string, addrs ...string) {
	p.t.Helper()
	// Without a queue, as CNI plugins make it.
	p.ip("link", "add", name, "txqueuelen", "0", "type", "veth", "peer", "name", name, "netns", p.outside)
	p.run("ip", "-n", p.outside, "link", "set", name, "up")
	p.ip("link", "set", name, "up")
	for _, a := range addrs {
		p.ip("addr", "add", a, "dev", name)
	}
}

func (p place) state() string {
	p.t.Helper()
	s := p.ip("-o", "-d", "link") + p.ip("-o", "addr") + p.ip("route") + p.tc("qdisc") + p.tc("filter")
	// The carrier's state follows late; a tap keeps the form of its last opener's headers.
	return regexp.MustCompile(`NO-CARRIER,|,LOWER_UP| state [A-Z]+| vnet_hdr o\w+`).ReplaceAllString(s, "")
}

func (p place) options(change ...func(*Options)) Options {
	o := Options{Model: TCFilter, Queues: 1, Ledger: p.ledger, Log: slog.New(slog.NewTextHandler(logTo{p.t}, nil))}
	for _, f := range change {
		f(&o)
	}
	return o
}

type logTo struct{ t *testing.T }

func (l logTo) Write(b []byte) (int, error) { l.t.Logf("%s", b); return len(b), nil }

func (p place) open(change ...func(*Options)) *Network {
	p.t.Helper()
	n, err := Open(p.t.Context(), p.path(), p.options(change...))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { n.Close() })
	return n
}

// closed checks that a closed network leaves nothing.
func (p place) closed(n *Network, before string) {
	p.t.Helper()
	if err := n.Close(); err != nil {
		p.t.Error(err)
	}
	p.unchanged(before)
	if left := p.ledger.Entries(); len(left) > 0 {
		p.t.Errorf("in the ledger: %v", left)
	}
}

func (p place) unchanged(before string) {
	p.t.Helper()
	if after := p.state(); after != before {
		p.t.Errorf("the namespace is\n%s\nit was\n%s", after, before)
	}
}

// packet opens a raw socket on a device outside.
func (p place) packet(device string) *os.File {
	p.t.Helper()
	ns, err := openNamespace("/run/netns/" + p.outside)
	if err != nil {
		p.t.Fatal(err)
	}
	defer ns.close()
	var f *os.File
	err = ns.do(func() error {
		proto := uint16(testEtherType>>8 | testEtherType<<8&0xff00)
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(proto))
		if err != nil {
			return err
		}
		f = os.NewFile(uintptr(fd), "packet")
		l, err := ns.nl.LinkByName(device)
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: l.Attrs().Index})
	})
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { f.Close() })
	return f
}

// testEtherType is one for local experiments (IEEE 802).
const testEtherType = 0x88b5

// vnetHeader is the length of struct virtio_net_hdr before the guest chose another.
const vnetHeader = 10

func frame(dst, src net.HardwareAddr, text string) []byte {
	f := append(append(append([]byte(nil), dst...), src...), testEtherType>>8, testEtherType&0xff)
	return append(f, bytes.Repeat([]byte(text), 60/len(text))...)
}

// carries checks that frames pass between the machine's end of a device and its outside.
func (p place) carries(n *Network, device string, queue int) {
	p.t.Helper()
	out := p.packet(device)
	var e *endpoint
	for _, have := range n.endpoints {
		if have.Link.Name == device {
			e = have
		}
	}
	if e == nil {
		p.t.Fatalf("%s is not connected", device)
	}
	q := e.taps[queue]
	if err := unix.SetNonblock(int(q.Fd()), true); err != nil {
		p.t.Fatal(err)
	}
	in := os.NewFile(uintptr(mustDup(p.t, q)), "tap") // polled
	defer in.Close()
	guest, peer := e.Link.MAC, net.HardwareAddr{2, 0, 0, 0, 0, 0xfe}
	fromGuest := frame(peer, guest, "from the guest ")
	if _, err := in.Write(append(make([]byte, vnetHeader), fromGuest...)); err != nil {
		p.t.Fatal(err)
	}
	p.reads(out, fromGuest, 0)
	toGuest := frame(guest, peer, "to the guest ")
	if _, err := out.Write(toGuest); err != nil {
		p.t.Fatal(err)
	}
	p.reads(in, toGuest, vnetHeader)
}

func mustDup(t *testing.T, f *os.File) int {
	t.Helper()
	fd, err := unix.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// reads waits for a frame among others.
func (p place) reads(f *os.File, want []byte, skip int) {
	p.t.Helper()
	if err := f.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		p.t.Fatal(err)
	}
	buf := make([]byte, 2048)
	for {
		n, err := f.Read(buf)
		if err != nil {
			p.t.Fatalf("a frame does not arrive: %v", err)
		}
		if n >= skip && bytes.Equal(buf[skip:n], want) {
			return
		}
	}
}

func TestConnect(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"tcfilter": func(*Options) {},
		"rates":    func(o *Options) { o.RxRate, o.TxRate = 1e9, 1e9 },
		"macvtap":  func(o *Options) { o.Model = Macvtap },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t)
			p.veth("eth0", "10.0.0.2/24")
			p.veth("net1")
			p.ip("link", "set", "net1", "mtu", "1400")
			before := p.state()
			n := p.open(change)
			p.carries(n, "eth0", 0)
			p.carries(n, "net1", 0)
			if s := p.ip("link"); strings.Count(s, "mtu 1400") != 2 {
				t.Errorf("the tap has another MTU than its device:\n%s", s)
			}
			if _, err := Open(t.Context(), p.path(), p.options(change)); err == nil {
				t.Error("a namespace was connected twice")
			}
			p.carries(n, "eth0", 0) // undisturbed
			p.closed(n, before)
		})
	}
}

func TestQueues(t *testing.T) {
	for _, model := range []Model{TCFilter, Macvtap} {
		p := newPlace(t)
		p.veth("eth0")
		before := p.state()
		n := p.open(func(o *Options) { o.Model, o.Queues = model, 3 })
		nics, err := n.NICs()
		if err != nil || len(nics) != 1 || len(nics[0].Taps) != 3 || nics[0].MAC.String() != n.endpoints[0].Link.MAC.String() {
			t.Errorf("%s: NICs %+v, %v", model, nics, err)
		}
		for _, nic := range nics {
			nic.Close()
		}
		p.closed(n, before)
	}
}

// TestTapOfItsOwn: a tap that nobody holds is used as it is, and stays.
func TestTapOfItsOwn(t *testing.T) {
	p := newPlace(t)
	p.ip("tuntap", "add", "dev", "tap0", "mode", "tap")
	p.ip("link", "set", "tap0", "up")
	before := p.state()
	n := p.open()
	if len(n.endpoints) != 1 || n.endpoints[0].Method != MethodTap || len(n.endpoints[0].taps) != 1 {
		t.Fatalf("endpoints %+v", n.endpoints)
	}
	p.closed(n, before)
}

// TestOthersQdisc: filters of somebody else stay, and come first.
func TestOthersQdisc(t *testing.T) {
	p := newPlace(t)
	p.veth("eth0")
	p.tc("qdisc", "add", "dev", "eth0", "clsact")
	p.tc("filter", "add", "dev", "eth0", "ingress", "protocol", "ip", "prio", "1", "u32", "match", "ip", "dst", "192.0.2.1", "flowid", "1:1")
	before := p.state() + p.tc("filter", "show", "dev", "eth0", "ingress")
	n := p.open()
	p.carries(n, "eth0", 0)
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if after := p.state() + p.tc("filter", "show", "dev", "eth0", "ingress"); after != before {
		t.Errorf("the namespace is\n%s\nit was\n%s", after, before)
	}
}

// TestKilled: the ledger of a process that was killed undoes everything.
func TestKilled(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"tcfilter": func(*Options) {},
		"rates":    func(o *Options) { o.TxRate = 1e9 },
		"macvtap":  func(o *Options) { o.Model = Macvtap },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t)
			p.veth("eth0")
			before := p.state()
			n, err := Open(t.Context(), p.path(), p.options(change))
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range n.endpoints { // as the kernel does with a killed process
				closeFiles(e.taps)
			}
			n.ns.close()
			p.ledger.LockFile().Close()
			if _, err := ledger.Reap(context.Background(), p.root, "key"); err != nil {
				t.Fatal(err)
			}
			p.unchanged(before)
		})
	}
}

func TestRefused(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func(place)
		change  func(*Options)
		kind    func(error) bool
		words   string
	}{
		"no device":          {nil, func(o *Options) { o.Required = true }, errdefs.IsFailedPrecondition, "no network device"},
		"another root qdisc": {func(p place) { p.veth("eth0"); p.tc("qdisc", "add", "dev", "eth0", "root", "handle", "1:", "pfifo") }, func(o *Options) { o.TxRate = 1e6 }, errdefs.IsFailedPrecondition, "eth0"},
		"MTU": {func(p place) {
			p.veth("eth0")
			p.run("ip", "-n", p.outside, "link", "set", "eth0", "mtu", "65535")
			p.ip("link", "set", "eth0", "mtu", "65535")
		}, nil, errdefs.IsInvalidArgument, "MTU 65535"},
		"the second of two": {func(p place) {
			p.veth("eth0")
			p.veth("eth1")
			p.ip("tuntap", "add", "dev", tapPrefix+p.index("eth1"), "mode", "tap")
		}, nil, errdefs.IsFailedPrecondition, tapPrefix},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t)
			if c.prepare != nil {
				c.prepare(p)
			}
			before := p.state()
			o := p.options()
			if c.change != nil {
				c.change(&o)
			}
			_, err := Open(t.Context(), p.path(), o)
			if err == nil || !c.kind(err) || !strings.Contains(err.Error(), c.words) || !strings.Contains(err.Error(), p.path()) {
				t.Errorf("got %v", err)
			}
			p.unchanged(before)
			if left := p.ledger.Entries(); len(left) > 0 {
				t.Errorf("in the ledger: %v", left)
			}
		})
	}
	p := newPlace(t)
	for _, path := range []string{"/run/netns/none", "/dev/null"} {
		if _, err := Open(t.Context(), path, p.options()); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: got %v", path, err)
		}
	}
}

func (p place) index(device string) string {
	return strings.TrimSpace(p.run("ip", "netns", "exec", p.pod, "cat", "/sys/class/net/"+device+"/ifindex"))
}
